addEventListener("DOMContentLoaded", () => {
  // A figure is a link to itself: wide ones are small on a page, and smaller on a phone, where they scroll.
  for (const figure of document.querySelectorAll("article img:not(a img)")) {
    const link = document.createElement("a");
    link.href = figure.src;
    figure.replaceWith(link);
    link.append(figure);
    const mark = () => link.classList.toggle("wide-figure", figure.naturalWidth > 700);
    figure.complete ? mark() : figure.addEventListener("load", mark);
  }
  // Names of columns may break after an underscore, so that more columns fit.
  for (const name of document.querySelectorAll(".cell_output thead th")) name.innerHTML = name.innerHTML.replaceAll("_", "_<wbr>");
  // Long names break where their parts meet; in the page's contents a method stands under its class, and needs no more than its own name.
  for (const name of document.querySelectorAll(".bd-sidebar-secondary nav a, section:has(> p > .source-link) > :is(h3, h4)")) {
    for (const text of [name, ...name.querySelectorAll("*")].flatMap((e) => [...e.childNodes]).filter((n) => n.nodeType === Node.TEXT_NODE)) {
      const shown = name.matches("a") ? text.data.replace(/^\s*[A-Z]\w+(?=\.\w+\s*$)/, "") : text.data;
      text.replaceWith(...shown.split(/(?<=\w[_.])(?=\w)/).flatMap((part) => [document.createElement("wbr"), part]).slice(1));
    }
  }
  // Words in a table wrap, but not into a column of single words.
  for (const cell of document.querySelectorAll(".cell_output table.dataframe td")) cell.classList.toggle("words", cell.textContent.length > 30);
  // No comma or bracket alone at the start of a line: what follows a formula stays with it.
  for (const formula of document.querySelectorAll("article span.math")) {
    const mark = formula.nextSibling?.nodeType === Node.TEXT_NODE && formula.nextSibling.data.match(/^[^\s\w]{1,2}/);
    if (!mark) continue;
    formula.nextSibling.splitText(mark[0].length);
    const pair = document.createElement("span");
    pair.className = "with-mark";
    formula.before(pair);
    pair.append(formula, pair.nextSibling);
  }
  // Printed lines wrap as prose does, rows of a matrix do not. Where rows of a table are among them, whose columns must stay in line, only long lines do.
  for (const pre of document.querySelectorAll(".cell_output .output pre")) {
    const table = /\S {3,}\S/.test(pre.textContent);
    pre.replaceChildren(...pre.textContent.split(/(?<=\n)/).map((text) => {
      const line = document.createElement("span");
      line.textContent = text;
      line.className = /\S {3,}\S|^(tensor\(|array\()?\[\[|^\s+\[+[-\d. ]/.test(text) || (table && text.length < 90) ? "aligned" : "";
      return line;
    }));
  }
});

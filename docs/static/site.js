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
  // Words in a table wrap, but not into a column of single words.
  for (const cell of document.querySelectorAll(".cell_output table.dataframe td")) cell.classList.toggle("words", cell.textContent.length > 30);
  // Printed lines wrap as prose does. Where rows of a table are among them, whose columns must stay in line, only long lines do.
  for (const pre of document.querySelectorAll(".cell_output .output pre")) {
    const table = /\S {3,}\S/.test(pre.textContent);
    pre.replaceChildren(...pre.textContent.split(/(?<=\n)/).map((text) => {
      const line = document.createElement("span");
      line.textContent = text;
      line.className = /\S {3,}\S/.test(text) || (table && text.length < 90) ? "aligned" : "";
      return line;
    }));
  }
});

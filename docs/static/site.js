addEventListener("DOMContentLoaded", () => {
  // A figure is a link to itself: wide ones are small on a page, and smaller on a phone.
  for (const figure of document.querySelectorAll("article img:not(a img)")) {
    const link = document.createElement("a");
    link.href = figure.src;
    figure.replaceWith(link);
    link.append(figure);
  }
  // Printed lines wrap as prose does, but for rows of a table, whose columns must stay in line.
  for (const pre of document.querySelectorAll(".cell_output .output pre")) {
    pre.replaceChildren(...pre.textContent.split(/(?<=\n)/).map((text) => {
      const line = document.createElement("span");
      line.textContent = text;
      line.className = /\S {3,}\S/.test(text) ? "aligned" : "";
      return line;
    }));
  }
});

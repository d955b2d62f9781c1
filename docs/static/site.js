// A figure is a link to itself: wide ones are small on a page, and smaller on a phone.
addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll("article img:not(a img)")) {
    const link = document.createElement("a");
    link.href = figure.src;
    figure.replaceWith(link);
    link.append(figure);
  }
});

// Put the chapters one after the other into this page. Ids get their chapter's name before them, so
// that two chapters may both have "exercises"; inside a drawing they are left alone, since its own
// parts refer to them.
async (names) => {
  const drawing = "svg *, .crc-figure *, .crc-explorer *";
  const chapters = [];
  for (const name of names) {
    const text = await (await fetch(`${name.split("/").at(-1)}.html`)).text();
    const page = new DOMParser().parseFromString(text, "text/html");
    const article = document.importNode(page.querySelector("article"), true);
    article.id = name.split("/").at(-1);
    article.style.breakBefore = chapters.length ? "page" : "auto";
    for (const node of article.querySelectorAll("[id]"))
      if (!node.matches(drawing)) node.id = `${article.id}--${node.id}`;
    for (const link of article.querySelectorAll("a[href]:not(svg a)")) {
      const href = link.getAttribute("href");
      const [file, part] = href.split("#");
      if (href.includes(":")) continue;
      const target = file ? file.split("/").at(-1).replace(/[.]html$/, "") : article.id;
      link.setAttribute("href", part ? `#${target}--${part}` : `#${target}`);
    }
    chapters.push(article);
  }
  const contents = document.createElement("ol");
  for (const chapter of chapters.slice(1)) {
    const link = contents.appendChild(document.createElement("li"))
      .appendChild(document.createElement("a"));
    link.href = `#${chapter.id}`;
    link.textContent = chapter.querySelector("h1").firstChild.textContent;
  }
  chapters[0].querySelector("h1").after(contents);
  document.title = chapters[0].querySelector("h1").firstChild.textContent;
  document.body.replaceChildren(...chapters);
  // What was parsed for another document has not run yet.
  for (const script of document.body.querySelectorAll("script:not([type='application/json'])")) {
    const live = document.createElement("script");
    live.textContent = script.textContent;
    script.replaceWith(live);
  }
  for (const plot of document.querySelectorAll(".js-plotly-plot")) await Plotly.Plots.resize(plot);
  await MathJax.typesetPromise();
  await document.fonts.ready;
  return [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((heading) => {
    const words = heading.cloneNode(true);
    words.querySelectorAll(".headerlink").forEach((link) => link.remove());
    return words.textContent.trim();
  });
}

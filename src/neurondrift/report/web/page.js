
"use strict";
// What the page can do beside being read: tables that sort, maps with a read-out, curves that can be switched off,
// contents that say where the reader is. It reads what stands in the page, loads nothing and keeps nothing.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const made = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Tables. A third press gives back the order in which the rows came.
  const collator = new Intl.Collator("en", { numeric: true });
  const number = (text) => {
    const found = /([<>]?)\s*([-+]?\d*\.?\d+(?:e[-+]?\d+)?)/i.exec(text.replace(/,(?=\d{3})/g, "").replace(/−/g, "-"));
    if (!found) return NaN;
    const value = Number(found[2]);
    return found[1] === "<" ? value - 1e-12 : found[1] === ">" ? value + 1e-12 : value;
  };
  const compared = (numeric) => (a, b) => {
    if (!numeric) return collator.compare(a, b);
    return number(a) - number(b);
  };
  const isMissing = (text, numeric) => (numeric ? Number.isNaN(number(text)) : /^[–-]?$/.test(text));
  const sortable = (table) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    if (rows.length < 3) return;
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      if (!head.textContent) return;
      const numeric = head.classList.contains("number");
      const button = made("button", { type: "button", title: "sort by this column" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const now = before === null ? "ascending" : before === "ascending" ? "descending" : null;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (now) head.setAttribute("aria-sort", now);
        const text = (row) => row.cells[column].textContent.trim();
        const known = rows.filter((row) => !isMissing(text(row), numeric));
        const missing = rows.filter((row) => isMissing(text(row), numeric));
        const sign = now === "descending" ? -1 : 1;
        known.sort((a, b) => sign * compared(numeric)(text(a), text(b)));
        body.append(...(now ? [...known, ...missing] : rows));
      });
    });
  };
  all("main table").forEach(sortable);

  // Maps. One stop of the Tab key a map; the arrow keys go from cell to cell, and over its edge into the next panel.
  const readable = (map) => {
    const panels = all(".panel", map).map((panel) => ({
      name: panel.dataset.name,
      cells: new Map(all("[data-at]", panel).map((cell) => [cell.dataset.at, cell])),
    }));
    const cells = all("[data-at]", map);
    if (!cells.length) return;
    const hint = "Point at a cell, or reach the map with Tab and go through it with the arrow keys.";
    const out = made("p", { className: "read-out" }, hint);
    out.setAttribute("aria-live", "polite");
    map.append(out);
    const rows = Math.max(...cells.map((cell) => Number(cell.dataset.at.split(" ")[0])));
    const columns = Math.max(...cells.map((cell) => Number(cell.dataset.at.split(" ")[1])));
    let stop = cells[0];
    stop.tabIndex = 0;
    const show = (cell) => {
      const at = cell.dataset.at;
      const title = cell.querySelector("title").textContent;
      const place = title.slice(0, title.length - cell.dataset.text.length - 2);
      cells.forEach((other) => other.classList.remove("here", "also"));
      const parts = panels.map(({ name, cells: own }) => {
        const other = own.get(at);
        if (other) other.classList.add(other === cell ? "here" : "also");
        const text = `${name} ${other ? other.dataset.text : "none there"}`;
        return made("span", { className: other === cell ? "this" : "" }, text);
      });
      const first = parts.findIndex((part) => part.className);
      out.replaceChildren(made("strong", {}, place), ": ", ...parts.splice(first, 1), ...parts);
    };
    const goTo = (cell) => {
      stop.tabIndex = -1;
      stop = cell;
      stop.tabIndex = 0;
      stop.focus();
    };
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
    const next = (cell, [up, right]) => {
      let panel = panels.findIndex(({ cells: own }) => own.get(cell.dataset.at) === cell);
      let [row, column] = cell.dataset.at.split(" ").map(Number);
      for (;;) {
        row += up;
        column += right;
        if (column < 0 || column > columns) {
          panel += right;
          column = right > 0 ? 0 : columns;
        }
        if (row < 0 || row > rows || !panels[panel]) return cell;
        const found = panels[panel].cells.get(`${row} ${column}`);
        if (found) return found;
      }
    };
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("[data-at]");
      if (!cell || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      goTo(next(cell, moves[event.key]));
    });
    map.addEventListener("focusin", (event) => event.target.dataset.at && show(event.target));
    map.addEventListener("pointerover", (event) => event.target.dataset?.at && show(event.target));
    map.addEventListener("click", (event) => event.target.dataset?.at && goTo(event.target));
  };
  all(".map").forEach(readable);

  // Curves that can be switched on and off: all elements of a figure with the same data-series.
  const switched = (figure) => {
    const curves = all("[data-series]", figure);
    const names = [...new Set(curves.map((curve) => curve.dataset.series))];
    if (names.length < 2) return;
    const boxes = names.map((name) => {
      const own = curves.filter((curve) => curve.dataset.series === name);
      const box = made("input", { type: "checkbox", checked: true });
      const swatch = made("i");
      const drawn = own.flatMap((curve) => all("path", curve)).find((path) => path.style.stroke);
      if (drawn) swatch.style.background = drawn.style.stroke;
      box.addEventListener("change", () => own.forEach((curve) => curve.classList.toggle("off", !box.checked)));
      return { box, label: made("label", {}, box, swatch, name.replaceAll("_", " ")) };
    });
    const each = (text, checked) => {
      const button = made("button", { type: "button" }, text);
      button.addEventListener("click", () =>
        boxes.forEach(({ box }) => {
          box.checked = checked;
          box.dispatchEvent(new Event("change"));
        }),
      );
      return button;
    };
    const legend = made("legend", {}, "Groups shown");
    const controls = boxes.map(({ label }) => label);
    figure.before(made("fieldset", { className: "series" }, legend, ...controls, each("all", true), each("none", false)));
  };
  all(".figure").forEach(switched);

  // What scrolls sideways can be reached with the Tab key, so that it can be scrolled without a mouse.
  const scrollers = all(".wide, .figure");
  const reachable = () =>
    scrollers.forEach((box) => {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    });
  reachable();
  window.addEventListener("resize", reachable);

  // Contents: the section that is being read.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const contents = document.querySelector("nav");
  const seen = new Set();
  const watch = new IntersectionObserver(
    (entries) => {
      entries.forEach(({ target, isIntersecting }) => (isIntersecting ? seen.add(target.id) : seen.delete(target.id)));
      const current = [...links.keys()].find((id) => seen.has(id));
      links.forEach((link, id) => {
        if (id === current) link.setAttribute("aria-current", "true");
        else if (current) link.removeAttribute("aria-current");
      });
      const here = links.get(current);
      if (here) contents.scrollTo(here.offsetLeft - contents.clientWidth / 3, here.offsetTop - contents.clientHeight / 3);
    },
    { rootMargin: "-10% 0px -75% 0px" },
  );
  links.forEach((link, id) => watch.observe(document.getElementById(id)));
})();

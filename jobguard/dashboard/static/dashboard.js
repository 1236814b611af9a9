// Everything here is an addition: without scripts the pages show the same, once.
"use strict";
(() => {
  const main = () => document.getElementById("main");
  const note = document.getElementById("connection");
  document.documentElement.classList.add("js");

  // -- curves ---------------------------------------------------------------------------------
  let shown = [];
  const clock = (at) => new Date(at * 1000).toISOString().slice(11, 16);
  function draw() {
    for (const one of shown) one.destroy();
    shown = [];
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const strokes = [colour("--good"), colour("--bad"), colour("--warn")];
    for (const place of document.querySelectorAll(".chart")) {
      const data = JSON.parse(place.dataset.chart);
      const names = Object.keys(data.curves);
      const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 } };
      shown.push(new uPlot({
        width: place.clientWidth, height: 180, cursor: { drag: { x: false } },
        series: [{ label: "UTC", value: (_, at) => at === null ? "" : clock(at) }, ...names.map((label, n) => ({ label, stroke: strokes[n], width: 2, points: { show: false } }))],
        axes: [{ ...axis, values: (_, at) => at.map(clock) }, { ...axis, size: 60 }],
        scales: { y: { range: (_, low, high) => [0, Math.max(high, 1)] } },
      }, [data.minutes, ...names.map((name) => data.curves[name])], place));
    }
  }

  // -- live -----------------------------------------------------------------------------------
  let asked = false, waiting = false;
  const busy = () => {
    const on = document.activeElement;
    const typing = on && main().contains(on) && /^(INPUT|SELECT|TEXTAREA)$/.test(on.tagName);
    return typing || !getSelection().isCollapsed || main().querySelector("form[method=post]");
  };
  async function renew() {
    if (asked) { waiting = true; return; }
    if (document.hidden || busy()) return;
    asked = true;
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" } });
      if (answer.redirected && new URL(answer.url).pathname.endsWith("/login")) { location.reload(); return; }
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("main");
      if (fresh && !busy()) {
        const open = [...main().querySelectorAll("details")].map((one) => one.open);
        const link = document.activeElement && main().contains(document.activeElement)
          ? document.activeElement.getAttribute("href") : null;
        main().replaceChildren(...fresh.childNodes);
        [...main().querySelectorAll("details")].forEach((one, n) => { one.open = open[n] || false; });
        if (link) main().querySelector(`a[href="${CSS.escape(link)}"]`)?.focus();
        draw();
      }
    } catch { /* the next event asks again */ } finally {
      asked = false;
      if (waiting) { waiting = false; setTimeout(renew, 500); }
    }
  }
  const events = new EventSource(document.body.dataset.live);
  let first = true;
  events.addEventListener("change", (event) => {
    note.hidden = event.data !== "away";
    note.textContent = event.data === "away" ? "PostgreSQL does not answer: what you see may be old." : "";
    if (first) first = false; else if (event.data !== "away") renew();
  });
  events.onerror = () => { note.hidden = false; note.textContent = "The page is not live at the moment."; };
  events.onopen = () => { note.hidden = true; };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) renew(); });

  // -- keys -----------------------------------------------------------------------------------
  let going = false;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (going) {
      going = false;
      for (const link of document.querySelectorAll("nav a")) if (link.dataset.key === event.key) link.click();
    } else if (event.key === "g") {
      going = true;
      setTimeout(() => { going = false; }, 1500);
    } else if (event.key === "/") {
      event.preventDefault();
      document.getElementById("search").focus();
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let sizing;
  addEventListener("resize", () => { clearTimeout(sizing); sizing = setTimeout(draw, 200); });
  draw();
})();

// Draws which tokens a query keeps, from lifespans: key j is visible to query i  <=>  birth[j] <= i < death[j].
// Whatever comes from the text is written with textContent.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const length = data.tokens.length;
  const TABLE_ROWS = 200;
  const LEVELS = 4;
  const state = { model: 0, layer: 0, head: 0, query: Math.min(length - 1, Math.max(0, data.models[0].window * 2)), pinned: false };

  const layers = () => data.models[state.model].layers;
  const current = () => layers()[state.layer][state.head];
  const within = (value, low, high) => Math.min(high, Math.max(low, value));
  const wholeNumber = (text, otherwise) => (/^\d+$/.test(text ?? "") ? Number(text) : otherwise);
  const short = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(4))) : String(value));
  const named = (key) => (data.tokens[key] === " " ? "␣" : data.tokens[key]);
  const isVisible = (head, key, query) => data.birth[key] <= query && query < head.death[key];

  // Gates as numbers; JSON carries NaN and the infinities as strings.
  for (const model of data.models) for (const layer of model.layers) for (const head of layer) head.gate = head.gate.map(Number);

  const continuation = new Set(data.continuations);
  const lineEnd = new Set(data.lineEnds);
  const spans = data.tokens.map((label, key) => {
    const span = document.createElement("span");
    span.textContent = label;
    span.dataset.key = key;
    at("text").append(span);
    if (lineEnd.has(key)) at("text").append("\n");
    return span;
  });
  const form = (key) => (continuation.has(key) || lineEnd.has(key) ? " mark" : "");

  // Buttons are made anew only when their number changes: the one that has the focus keeps it.
  function choice(id, name, count, chosen) {
    const group = at(id);
    if (group.children.length !== count) {
      group.replaceChildren(...Array.from({ length: count }, (_, index) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = `${name} ${index}`;
        button.addEventListener("click", () => { state[name] = index; show(true); });
        return button;
      }));
    }
    [...group.children].forEach((button, index) => button.setAttribute("aria-pressed", String(index === chosen)));
  }

  // For each key its class.  Kept keys have one of four levels by the rank of their gate, as ranking is what selects.
  function classes(head, kept) {
    const level = new Map(kept.map((key, rank) => [key, LEVELS - 1 - Math.floor((rank * LEVELS) / kept.length)]));
    return spans.map((_, key) => {
      let name = "future";
      if (level.has(key)) name = `kept g${level.get(key)}`;
      else if (head.death[key] <= data.birth[key]) name = data.birth[key] <= state.query ? "never" : "future";
      else if (data.birth[key] <= state.query) name = "evicted";
      return `token ${name}${key === state.query ? " query" : ""}${form(key)}`;
    });
  }

  function keptKeys(head) {
    const rank = (key) => (Number.isNaN(head.gate[key]) ? Infinity : head.gate[key]);
    const kept = [];
    for (let key = 0; key < length; key++) if (isVisible(head, key, state.query)) kept.push(key);
    return kept.sort((a, b) => (rank(b) === rank(a) ? b - a : rank(b) - rank(a)));
  }

  function drawRows(head, kept) {
    const own = head.gate[state.query];
    at("rows").replaceChildren(...kept.slice(0, TABLE_ROWS).map((key) => {
      const row = document.createElement("tr");
      const until = head.death[key] >= length ? "the end" : head.death[key] - 1;
      const cells = [key, named(key), short(head.gate[key]), short(head.gate[key] - own), until];
      row.append(...cells.map((content, column) => {
        const cell = document.createElement("td");
        const place = column === 1 ? document.createElement("span") : cell;
        place.textContent = content;
        if (column === 1) { place.className = spans[key].className; cell.append(place); }
        return cell;
      }));
      return row;
    }));
    at("more").textContent = kept.length > TABLE_ROWS ? `and ${kept.length - TABLE_ROWS} more` : "";
  }

  function drawStrip(head, kept) {
    const canvas = at("strip"), context = canvas.getContext("2d");
    const finite = head.gate.filter(Number.isFinite);
    const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
    const width = canvas.width / length, colours = getComputedStyle(document.documentElement);
    const height = (gate) => (0.06 + 0.94 * (high > low ? (gate - low) / (high - low) : 0.5)) * canvas.height;
    const bar = (key, colour) => {
      if (!Number.isFinite(head.gate[key])) return;
      context.fillStyle = colour;
      const tall = height(head.gate[key]);
      context.fillRect(key * width, canvas.height - tall, Math.max(1.5, width * 0.9), tall);
    };
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let key = 0; key < length; key++) bar(key, colours.getPropertyValue(key <= state.query ? "--never" : "--rule"));
    for (const key of kept) bar(key, "#2b7bba");
    context.fillStyle = colours.getPropertyValue("--accent");
    context.fillRect(state.query * width - 1, 0, 3, canvas.height);
    at("range").textContent = `gates along the text, ${short(low)} to ${short(high)}; blue: kept`;
  }

  function show(remember) {
    state.layer = within(state.layer, 0, layers().length - 1);
    state.head = within(state.head, 0, layers()[state.layer].length - 1);
    state.query = within(state.query, 0, length - 1);
    const head = current(), kept = keptKeys(head);
    classes(head, kept).forEach((name, key) => { if (spans[key].className !== name) spans[key].className = name; });
    choice("layers", "layer", layers().length, state.layer);
    choice("heads", "head", layers()[state.layer].length, state.head);
    at("model").value = String(state.model);
    at("query").value = String(state.query);
    at("pinned").classList.toggle("on", state.pinned);
    const past = state.query + 1;
    at("status").textContent =
      `Query ${state.query} “${named(state.query)}” in layer ${state.layer}, head ${state.head} keeps ${kept.length} of ` +
      `the ${past} ${past === 1 ? "key" : "keys"} up to it (w = ${data.models[state.model].window}); ${past - kept.length} are evicted or were never visible.`;
    drawRows(head, kept);
    drawStrip(head, kept);
    if (remember) {
      history.replaceState(null, "", `#model=${state.model}&layer=${state.layer}&head=${state.head}&query=${state.query}`);
    }
  }

  function goTo(query) {
    state.query = within(query, 0, length - 1);
    state.pinned = true;  // else the mouse, lying somewhere, would take the query back
    show(true);
    spans[state.query].scrollIntoView({ block: "nearest" });
  }

  function stepHead(step) {
    const heads = layers()[0].length;
    const index = within(state.layer * heads + state.head + step, 0, layers().length * heads - 1);
    [state.layer, state.head] = [Math.floor(index / heads), index % heads];
    show(true);
  }

  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const name of ["model", "layer", "head", "query"]) state[name] = wholeNumber(asked.get(name), state[name]);
    state.model = within(state.model, 0, data.models.length - 1);
    if (asked.has("query")) state.pinned = true;
    show(false);
    if (asked.has("query")) spans[state.query].scrollIntoView({ block: "nearest" });
  }

  const keyOf = (event) => wholeNumber(event.target.closest?.("[data-key]")?.dataset.key, null);
  at("text").addEventListener("mouseover", (event) => {
    const key = keyOf(event);
    if (key !== null && !state.pinned && key !== state.query) { state.query = key; show(false); }
  });
  at("text").addEventListener("click", (event) => {
    const key = keyOf(event);
    if (key === null) return;
    state.pinned = !(state.pinned && key === state.query);
    state.query = key;
    show(true);
  });
  at("model").addEventListener("change", () => { state.model = Number(at("model").value); show(true); });
  at("query").addEventListener("change", () => goTo(wholeNumber(at("query").value, state.query)));
  addEventListener("hashchange", readAddress);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(false));

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
    const far = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowLeft: () => goTo(state.query - far), ArrowRight: () => goTo(state.query + far),
      ArrowUp: () => stepHead(-1), ArrowDown: () => stepHead(1),
      Home: () => goTo(0), End: () => goTo(length - 1),
      m: () => { state.model = (state.model + 1) % data.models.length; show(true); },
      Escape: () => { state.pinned = false; show(true); },
    };
    const action = actions[event.key] ?? actions[event.key.toLowerCase()];
    if (action) { event.preventDefault(); action(); }
  });

  at("model").append(...data.models.map((model, index) => {
    const option = document.createElement("option");
    option.value = String(index);
    option.textContent = model.label;
    return option;
  }));
  at("query").max = String(length - 1);
  const last = data.start + length - 1;
  const part = length === data.total ? `all ${data.total} bytes` : `bytes ${data.start} to ${last} of ${data.total}`;
  at("source").textContent = `of ${data.file}, ${part}`;
  readAddress();
})();

// The text, the query and what is chosen.
const LEVELS = 4;
// Probabilities from which on the full model's attention to a token is drawn, stronger at each.
const LOOKS = [0.01, 0.05, 0.2];
const first = data.models[0].layers[0][0];
const state = { model: 0, layer: 0, head: 0, query: Math.min(length - 1, 2 * (first.capacity ?? length)), pinned: false };

const layers = () => data.models[state.model].layers;
const within = (value, low, high) => Math.min(high, Math.max(low, value));
const wholeNumber = (text, otherwise) => (/^\d+$/.test(text ?? "") ? Number(text) : otherwise);

const spans = data.tokens.map((label, key) => {
  const span = document.createElement("span");
  span.textContent = lineEnd.has(key) ? label.replaceAll("↵", "↵\n") : label;
  span.dataset.key = key;
  return span;
});
at("text").append(...spans);
const form = (key) => (continuation.has(key) || data.tokens[key] === "↵" ? " mark" : "");

// For each key its class.  Kept keys have one of four levels by the rank of their gate, as ranking is what selects.
function classes(head, kept, attended) {
  const level = new Map(kept.map((key, rank) => [key, LEVELS - 1 - Math.floor((rank * LEVELS) / kept.length)]));
  const looks = new Map((attended ?? []).map(({ key, probability }) => [key, LOOKS.filter((least) => probability >= least).length]));
  return spans.map((_, key) => {
    let name = "future";
    if (level.has(key)) name = `kept g${level.get(key)}`;
    else if (data.birth[key] <= state.query) name = isNeverVisible(head, key) ? "never" : "evicted";
    return `token ${name}${looks.get(key) ? ` a${looks.get(key)}` : ""}${key === state.query ? " query" : ""}${form(key)}`;
  });
}

function describe(head, kept) {
  const past = state.query + 1, keys = past === 1 ? "key" : "keys";
  const most = head.capacity === null ? "without a bound" : `at most ${head.capacity}`;
  const looks = head.attended ? ` ${percent(partOnKept(head, state.query))} of the full model’s attention is on kept keys.` : "";
  return `Query ${state.query} “${named(state.query)}” in layer ${state.layer}, head ${state.head} keeps ${kept.length} of the ` +
    `${past} ${keys} up to it (${most}); ${past - kept.length} are evicted or were never visible.${looks}`;
}

function choose(layer, head) {
  [state.layer, state.head] = [layer, head];
  show(true);
}

let drawn = null;
function show(remember) {
  if (drawn !== state.model) { drawChooser(layers(), choose); drawn = state.model; }
  state.layer = within(state.layer, 0, layers().length - 1);
  state.head = within(state.head, 0, layers()[state.layer].length - 1);
  state.query = within(state.query, 0, length - 1);
  const head = arraysOf(layers()[state.layer][state.head]);
  const kept = keptKeys(head, state.query), attended = attendedKeys(head, state.query);
  classes(head, kept, attended).forEach((name, key) => { if (spans[key].className !== name) spans[key].className = name; });
  markChosen(state.layer, state.head);
  at("model").value = String(state.model);
  at("query").value = String(state.query);
  at("pinned").classList.toggle("on", state.pinned);
  document.body.classList.toggle("beside", Boolean(attended));
  at("status").textContent = describe(head, kept);
  drawAttended(head, attended, state.query, spans);
  drawKept(head, kept, state.query, spans);
  drawStrip(head, kept, attended, state.query);
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
  const all = layers().flatMap((heads, layer) => heads.map((_, head) => [layer, head]));
  const now = all.findIndex(([layer, head]) => layer === state.layer && head === state.head);
  choose(...all[within(now + step, 0, all.length - 1)]);
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
const last = data.start + data.shown - 1;
const part = data.shown === data.total ? `all ${data.total} ${data.unit}` : `${data.unit} ${data.start} to ${last} of ${data.total}`;
at("source").textContent = `of ${data.file}, ${part}`;
readAddress();

// The chooser of layers and heads, the tables and the strip of gates.  Text is written with textContent only.
const at = (id) => document.getElementById(id);
const TABLE_ROWS = 200;
// Parts of the full model's attention that is on kept keys, on average; below each a cell is marked more.
const LOSSES = [0.98, 0.9, 0.75];

// One button per head, made anew for another model only: the one that has the focus keeps it.
function drawChooser(layers, choose) {
  const heads = Math.max(...layers.map((layer) => layer.length));
  const cell = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const rows = [cell("span", "layer"), ...layers.map((_, layer) => cell("span", layer))];
  for (let head = 0; head < heads; head++) {
    rows.push(cell("span", `head ${head}`));
    layers.forEach((layer, number) => rows.push(head < layer.length ? chooserButton(layer[head], number, head, choose) : cell("span", "")));
  }
  at("chooser").style.setProperty("--layers", layers.length);
  at("chooser").replaceChildren(...rows);
}

function chooserButton(head, layer, number, choose) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.capacity ?? "all";
  button.dataset.layer = layer;
  button.dataset.head = number;
  const keeps = head.capacity === null ? "keeps all keys" : `keeps at most ${head.capacity} keys`;
  const onKept = head.attended ? `; ${percent(head.attended.mean)} of the full model’s attention is on kept keys` : "";
  button.title = `layer ${layer}, head ${number} ${keeps}${onKept}`;
  button.setAttribute("aria-label", button.title);
  if (head.attended) button.className = `l${LOSSES.filter((bound) => head.attended.mean < bound).length}`;
  button.addEventListener("click", () => choose(layer, number));
  return button;
}

// Only the chosen button is reached by Tab; the arrow keys choose others.
function markChosen(layer, head) {
  const group = at("chooser"), chosen = group.querySelector(`[data-layer="${layer}"][data-head="${head}"]`);
  const hadFocus = group.contains(document.activeElement);
  for (const button of group.querySelectorAll("button")) {
    button.tabIndex = button === chosen ? 0 : -1;
    button.setAttribute("aria-pressed", String(button === chosen));
  }
  if (hadFocus) chosen.focus({ preventScroll: true });
  group.scrollLeft = Math.min(chosen.offsetLeft - chosen.offsetWidth, Math.max(group.scrollLeft, chosen.offsetLeft + 2 * chosen.offsetWidth - group.clientWidth));
}

function row(cells, spans, key) {
  const line = document.createElement("tr");
  line.append(...cells.map((content, column) => {
    const cell = document.createElement("td"), place = column === 1 ? document.createElement("span") : cell;
    place.textContent = content;
    if (column === 1) { place.className = key === null ? "" : spans[key].className; cell.append(place); }
    return cell;
  }));
  return line;
}

function drawKept(head, kept, query, spans) {
  const own = head.gate[query];
  at("rows").replaceChildren(...kept.slice(0, TABLE_ROWS).map((key) => {
    const until = head.death[key] >= length ? "the end" : head.death[key] - 1;
    return row([key, named(key), short(head.gate[key]), short(head.gate[key] - own), until], spans, key);
  }));
  at("more").textContent = kept.length > TABLE_ROWS ? `and ${kept.length - TABLE_ROWS} more` : "";
}

function drawAttended(head, attended, query, spans) {
  at("attended").hidden = !attended;
  if (!attended) return;
  const fate = (key) => {
    if (isVisible(head, key, query)) return "kept";
    return isNeverVisible(head, key) ? "never visible" : `evicted after ${head.death[key] - 1}`;
  };
  const rest = Math.max(0, 1 - attended.reduce((sum, { probability }) => sum + probability, 0));
  const lines = attended.map(({ key, probability }) => row([key, named(key), percent(probability), fate(key)], spans, key));
  at("looks").replaceChildren(...lines, row(["", "others", percent(rest), ""], spans, null));
}

function drawStrip(head, kept, attended, query) {
  const canvas = at("strip"), context = canvas.getContext("2d");
  let low = Infinity, high = -Infinity;
  for (const gate of head.gate) if (Number.isFinite(gate)) [low, high] = [Math.min(low, gate), Math.max(high, gate)];
  const width = canvas.width / length, styles = getComputedStyle(document.documentElement);
  const colour = Object.fromEntries(["never", "rule", "accent", "looked"].map((name) => [name, styles.getPropertyValue(`--${name}`)]));
  const bar = (key, fill) => {
    if (!Number.isFinite(head.gate[key])) return;
    context.fillStyle = fill;
    const tall = (0.06 + 0.79 * (high > low ? (head.gate[key] - low) / (high - low) : 0.5)) * canvas.height;
    context.fillRect(key * width, canvas.height - tall, Math.max(1.5, width * 0.9), tall);
  };
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (let key = 0; key < length; key++) bar(key, key <= query ? colour.never : colour.rule);
  for (const key of kept) bar(key, "#2b7bba");
  context.fillStyle = colour.looked;
  for (const { key, probability } of attended ?? []) {
    context.fillRect(key * width, 0, Math.max(3, width * 0.9), (0.02 + 0.11 * Math.sqrt(probability)) * canvas.height);
  }
  context.fillStyle = colour.accent;
  context.fillRect(query * width - 1, 0, 3, canvas.height);
  const above = attended ? "; from above: the full model’s attention" : "";
  at("range").textContent = `gates along the text, ${short(low)} to ${short(high)}; blue: kept${above}`;
}

// The data of the page: tokens, and for each layer and KV head lifespans, gates and the full model's attention.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const length = data.tokens.length;
const continuation = new Set(data.continuations);
const lineEnd = new Set(data.lineEnds);

// Little-endian numbers in base64.
function numbers(kind, text) {
  return new kind(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);
}

const decoded = new Map();

// The arrays of a head, decoded when it is shown first.
function arraysOf(head) {
  if (!decoded.has(head)) {
    const attended = head.attended;
    decoded.set(head, {
      capacity: head.capacity,
      death: numbers(Uint16Array, head.death),
      gate: numbers(Float32Array, head.gate),
      attended: attended && {
        keys: numbers(Uint16Array, attended.keys),
        probabilities: numbers(Uint16Array, attended.probabilities),
        onKept: numbers(Uint16Array, attended.onKept),
      },
    });
  }
  return decoded.get(head);
}

// Key j is visible to query i  <=>  birth[j] <= i < death[j].
const isVisible = (head, key, query) => data.birth[key] <= query && query < head.death[key];
const isNeverVisible = (head, key) => head.death[key] <= data.birth[key];

// The keys that a query keeps, best gate first, of equal gates the newest.
function keptKeys(head, query) {
  const rank = (key) => (Number.isNaN(head.gate[key]) ? Infinity : head.gate[key]);
  const kept = [];
  for (let key = 0; key < length; key++) if (isVisible(head, key, query)) kept.push(key);
  return kept.sort((a, b) => (rank(b) === rank(a) ? b - a : rank(b) - rank(a)));
}

// What the full model attends to from a query: [{key, probability}], largest first; null where no full model belongs to this.
function attendedKeys(head, query) {
  if (!head.attended) return null;
  const { keys, probabilities } = head.attended, top = keys.length / length, listed = [];
  for (let place = query * top; place < (query + 1) * top; place++) {
    if (probabilities[place] > 0) listed.push({ key: keys[place], probability: probabilities[place] / data.steps });
  }
  return listed;
}

const partOnKept = (head, query) => head.attended.onKept[query] / data.steps;

function short(value) {
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(2);
  return Number.isFinite(value) ? String(Number(value.toPrecision(4))) : String(value);
}
const percent = (part) => `${(100 * part).toFixed(1)} %`;
const named = (key) => data.tokens[key].replaceAll(" ", "␣");

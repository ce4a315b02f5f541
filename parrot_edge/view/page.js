// Shows, searches and filters the dialogues that follow this script. Every text enters the page as a
// text node: nothing here makes HTML out of a string, and the page's policy would refuse it.

const part = (name) => document.querySelector(`[data-part="${name}"]`);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const number = (value) => value.toLocaleString("en");
const plural = (count, noun) => `${number(count)} ${count === 1 ? noun : noun + "s"}`;
const body = document.body.dataset;

let index; // columns with an entry for each dialogue; see _Index in page.py
let count = 0; // dialogues in the page
let shown = []; // numbers of the dialogues that pass all filters, in order
let current = -1; // number of the dialogue that is open, or -1
let numberOf; // address -> number

// ---- Chunks: dialogues, unpacked as they are looked at

const recent = new Map(); // chunk -> promise of its dialogues, latest last
const parsed = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve));

async function packedChunk(chunk) {
  const chunks = document.getElementsByTagName("script");
  const at = chunk + firstChunk;
  if (!chunks[at + 1]) await parsed; // the last one that is there may still grow
  return chunks[at].textContent;
}
const firstChunk = document.scripts.length; // this script is the last one before them

function chunkOf(dialogue) {
  let low = 0;
  let high = index.chunks.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (index.chunks[middle] <= dialogue) low = middle;
    else high = middle;
  }
  return low;
}

async function readDialogue(dialogue) {
  const chunk = chunkOf(dialogue);
  const reading = recent.get(chunk) ?? packedChunk(chunk).then(unpack);
  recent.delete(chunk);
  recent.set(chunk, reading);
  if (recent.size > 8) recent.delete(recent.keys().next().value);
  return (await reading)[dialogue - index.chunks[chunk]];
}

// ---- Search: workers hold all texts; each asks for its next chunk when it has read one

const found = { words: [], serial: 0, read: 0, waiting: 0, holds: null };
const workers = [];

async function startSearch() {
  await parsed;
  const source = new Blob([part("worker").textContent], { type: "text/javascript" });
  const address = URL.createObjectURL(source);
  const policy = globalThis.trustedTypes?.createPolicy("parrot", { createScriptURL: () => address });
  let next = 0;
  async function feed(worker) {
    if (next >= index.chunks.length) return;
    const chunk = next++;
    worker.postMessage({ first: index.chunks[chunk], packed: await packedChunk(chunk) });
  }
  const several = Math.min(4, navigator.hardwareConcurrency || 1, index.chunks.length);
  for (let made = 0; made < several; made++) {
    const worker = new Worker(policy ? policy.createScriptURL(address) : address);
    worker.onmessage = ({ data }) => {
      if (data.read) {
        found.read += data.read;
        if (found.read === count) performance.mark("parrot searchable");
        feed(worker);
      }
      if (data.serial !== found.serial) return;
      if (!data.read) found.waiting--;
      if (found.holds) for (const dialogue of data.hits) found.holds[dialogue] = 1;
      const news = !data.read || data.hits.length || found.read === count;
      if (found.words.length && !found.waiting && news) refresh();
    };
    workers.push(worker);
    feed(worker);
  }
  if (found.words.length) ask();
}

// Words are found in any order; "several words" in quotes as they stand.
function wordsOf(query) {
  return [...query.toLowerCase().matchAll(/"([^"]+)"?|([^\s"]+)/g)].map((match) => match[1] ?? match[2]);
}

function ask() {
  found.serial++;
  found.waiting = workers.length;
  found.holds = found.words.length ? new Uint8Array(count) : null;
  for (const worker of workers) worker.postMessage({ serial: found.serial, words: found.words });
}

// ---- Filters

const facets = []; // {values, boxes}: of the labels chosen in a facet, a dialogue has one or more
const ranges = []; // {values, low, high}

function makeFilters() {
  for (const { kind, names, values } of index.facets) {
    const counts = tally(names, values, everyNumber());
    const boxes = names.map((name) => element("input", { type: "checkbox", ariaLabel: name }));
    const chips = names.map((name, at) => {
      const text = element("span", {}, element("bdi", {}, name), element("b", {}, number(counts[at])));
      return element("label", { className: "chip" }, boxes[at], text);
    });
    const title = kind[0].toUpperCase() + kind.slice(1);
    const group = element("div", { className: "chips" }, ...chips);
    part("facets").append(element("fieldset", {}, element("legend", {}, title), group));
    facets.push({ values, boxes });
  }
  for (const { name, values } of index.measures) {
    const [least, most] = extent(values, everyNumber());
    const input = (side, limit) =>
      element("input", { type: "number", min: 0, placeholder: limit, ariaLabel: `${side} ${name}` });
    const [low, high] = [input("Least", least), input("Most", most)];
    const row = element("div", {}, low, "to", high);
    const title = name[0].toUpperCase() + name.slice(1);
    part("ranges").append(element("fieldset", {}, element("legend", {}, title), row));
    ranges.push({ values, low, high });
  }
}

function* everyNumber() {
  for (let dialogue = 0; dialogue < count; dialogue++) yield dialogue;
}

// The filters that are in use, each as a question about a dialogue.
function activeFilters() {
  const active = [];
  for (const { values, boxes } of facets) {
    const chosen = boxes.reduce((bits, box, at) => bits | (box.checked ? 1 << at : 0), 0);
    if (chosen) active.push((dialogue) => values[dialogue] & chosen);
  }
  for (const { values, low, high } of ranges) {
    const [least, most] = [low.valueAsNumber, high.valueAsNumber];
    if (!Number.isNaN(least)) active.push((dialogue) => values[dialogue] >= least);
    if (!Number.isNaN(most)) active.push((dialogue) => values[dialogue] <= most);
  }
  part("active").textContent = active.length ? ` · ${active.length}` : "";
  if (found.holds) active.push((dialogue) => found.holds[dialogue]);
  return active;
}

function refresh() {
  const active = activeFilters();
  shown = [];
  for (let dialogue = 0; dialogue < count; dialogue++) {
    if (active.every((passes) => passes(dialogue))) shown.push(dialogue);
  }
  const all = plural(count, "dialogue");
  const of = shown.length === count ? all : `${number(shown.length)} of ${all}`;
  const reading = found.words.length && found.read < count;
  part("status").textContent = reading ? `${of} · searched ${number(found.read)} so far` : of;
  part("reset").hidden = !active.length && !found.words.length;
  layList();
  if (current < 0) drawOverview();
}

part("filters").addEventListener("input", (event) => {
  if (event.target !== part("query")) return refresh();
  found.words = wordsOf(part("query").value);
  ask();
  // Answers come in some milliseconds; until then the list stays rather than flickers.
  if (!found.words.length || !workers.length) refresh();
});
part("filters").addEventListener("submit", (event) => event.preventDefault());
part("reset").addEventListener("click", () => {
  part("filters").reset();
  found.words = [];
  ask();
  refresh();
  part("query").focus();
});

// ---- The list: only the items in sight exist

const list = part("list");
const reel = element("div", { className: "reel", role: "presentation" });
let itemHeight = 64;

function layList() {
  const nothing = element("p", { className: "nothing" }, count ? "No dialogue passes." : "There is none.");
  list.replaceChildren(shown.length ? reel : nothing);
  itemHeight = 4 * parseFloat(getComputedStyle(document.documentElement).fontSize);
  reel.style.height = `${shown.length * itemHeight}px`;
  drawItems();
}

function drawItems() {
  const first = Math.max(0, Math.floor(list.scrollTop / itemHeight) - 4);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / itemHeight) + 4);
  const items = [];
  for (let at = first; at < last; at++) items.push(makeItem(at));
  reel.replaceChildren(...items);
  const selected = items.find((item) => item.ariaSelected === "true");
  if (selected) list.setAttribute("aria-activedescendant", selected.id);
  else list.removeAttribute("aria-activedescendant");
}

function makeItem(at) {
  const dialogue = shown[at];
  const opening = element("span", { dir: "auto" }, index.openings[dialogue] || "(no messages)");
  const about = element("small", {}, summary(dialogue));
  const item = element("div", { className: "item", role: "option" }, opening, about);
  item.id = `parrot item ${dialogue}`; // with spaces, as few dialogues' ids are: addresses lead to those
  item.ariaSelected = String(dialogue === current);
  item.ariaPosInSet = at + 1;
  item.ariaSetSize = shown.length;
  item.style.top = `${at * itemHeight}px`;
  item.dataset.number = dialogue;
  return item;
}

const LISTED = ["stop reason", "flags"]; // labels that have a place in the list

function summary(dialogue) {
  const listed = index.facets.filter(({ kind }) => LISTED.includes(kind));
  return [...lengthsOf(dialogue), ...listed.flatMap((facet) => labelsIn(facet, dialogue))].join(" · ");
}

// The first two measures are what it takes to read a dialogue: "8 turns", "512 words".
function lengthsOf(dialogue) {
  const lengths = index.measures.slice(0, 2);
  return lengths.map(({ name, values }) => plural(values[dialogue], name.replace(/s$/, "")));
}

function labelsIn({ names, values }, dialogue) {
  return names.filter((_, at) => values[dialogue] & (1 << at));
}

function scrollTo(at) {
  if (at < 0) return; // what is open does not pass the filters
  const top = at * itemHeight;
  const lowest = top + itemHeight - list.clientHeight;
  list.scrollTop = Math.min(Math.max(list.scrollTop, lowest), top);
}

list.addEventListener("scroll", drawItems);
addEventListener("resize", layList);
list.addEventListener("click", ({ target }) => {
  const item = target.closest(".item");
  if (item) go(Number(item.dataset.number));
});
list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(list.clientHeight / itemHeight) - 1);
  const at = shown.indexOf(current);
  const to = {
    ArrowDown: at + 1,
    ArrowUp: at < 0 ? 0 : at - 1,
    PageDown: at + page,
    PageUp: at - page,
    Home: 0,
    End: shown.length - 1,
  }[event.key];
  if (event.key === "Enter" && current >= 0) {
    go(current);
    part("dialogue").querySelector("h2")?.focus();
  } else if (to === undefined || !shown.length || event.altKey || event.ctrlKey || event.metaKey) return;
  else step(shown[Math.min(Math.max(to, 0), shown.length - 1)]);
  event.preventDefault();
});

// ---- A dialogue

async function open(dialogue) {
  current = dialogue;
  scrollTo(shown.indexOf(dialogue));
  drawItems();
  part("overview").hidden = dialogue >= 0;
  part("dialogue").hidden = dialogue < 0;
  if (dialogue < 0) {
    document.title = index.title;
    return drawOverview();
  }
  const row = await readDialogue(dialogue);
  if (current !== dialogue) return; // another was opened meanwhile
  document.title = `${index.openings[dialogue] || row.id} · ${index.title}`;
  part("dialogue").replaceChildren(...drawDialogue(dialogue, row));
  const main = document.querySelector("main");
  main.scrollTop = 0;
  main.querySelector("mark")?.scrollIntoView({ block: "center" });
}

function drawDialogue(dialogue, row) {
  const title = row.details.topic || index.openings[dialogue] || row.id;
  const about = element("p", { className: "about" }, element("bdi", {}, row.id));
  about.append(...lengthsOf(dialogue).map((length) => element("span", {}, length)));
  for (const facet of index.facets) {
    const labels = labelsIn(facet, dialogue).join(", ");
    if (labels) about.append(element("bdi", { className: "label" }, `${facet.kind}: ${labels}`));
  }
  const messages = element("ol", { className: "messages" });
  let turn = 0;
  for (const message of row.messages) {
    if (message.role === "user") turn++;
    const preferred = row.rejected !== undefined && message === row.messages.at(-1);
    const who = { user: `User · ${turn}`, assistant: "Assistant", system: "System" }[message.role];
    messages.append(drawMessage(message.role, preferred ? `${who} · chosen` : who, message.content));
  }
  if (row.rejected !== undefined) {
    messages.append(drawMessage("assistant rejected", "Assistant · rejected", row.rejected));
  }
  const heading = element("h2", { dir: "auto", tabIndex: -1 }, String(title));
  return [heading, about, makeNavigation(), messages, ...drawDetails(row.details)];
}

function drawMessage(kind, who, content) {
  const text = element("div", { dir: "auto" }, ...withMarks(content));
  return element("li", { className: `message ${kind}` }, element("h3", {}, who), text);
}

function makeNavigation() {
  const at = shown.indexOf(current);
  const button = (text, to) =>
    element("button", { type: "button", disabled: to === undefined, onclick: () => go(to) }, text);
  const copy = element("button", { type: "button" }, "Copy link");
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(addressOf(current));
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Copy it from the address bar";
    }
  };
  const previous = button("Previous", at < 0 ? undefined : shown[at - 1]);
  return element("nav", { ariaLabel: "Dialogue" }, previous, button("Next", shown[at + 1]), copy);
}

// The text in pieces, those that the search found marked.
function withMarks(text) {
  if (!found.words.length) return [text];
  const escaped = found.words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return text
    .split(new RegExp(`(${escaped.join("|")})`, "giu"))
    .map((piece, at) => (at % 2 ? element("mark", {}, piece) : piece));
}

function drawDetails(details) {
  const pairs = Object.entries(details).flatMap(([key, value]) => [
    element("dt", {}, element("bdi", {}, key)),
    element("dd", { dir: "auto" }, typeof value === "string" ? value : JSON.stringify(value)),
  ]);
  if (!pairs.length) return [];
  const summary = element("summary", {}, "Details");
  return [element("details", { className: "details" }, summary, element("dl", {}, ...pairs))];
}

// ---- The overview

function drawOverview() {
  const all = `${plural(count, "dialogue")}.`;
  const text = shown.length < count ? `What the filters leave: ${number(shown.length)} of ${all}` : all;
  const plots = shown.length ? [...index.measures.map(drawColumns), ...index.facets.map(drawBars)] : [];
  part("overview").replaceChildren(
    element("h2", { tabIndex: -1 }, "Overview"),
    element("p", {}, text),
    element("div", { className: "plots" }, ...plots),
  );
}

function drawColumns({ name, values }) {
  const sorted = Float64Array.from(shown, (dialogue) => values[dialogue]).sort();
  const [least, median, most] = [sorted[0], sorted[sorted.length >> 1], sorted.at(-1)];
  const high = sorted[Math.floor(sorted.length * 0.98)]; // a few giants would flatten all others
  const width = niceWidth((high - least) / 24);
  const start = Math.floor(least / width) * width;
  const counts = new Array(Math.floor((high - start) / width) + 1).fill(0);
  for (const value of sorted) counts[Math.min(Math.floor((value - start) / width), counts.length - 1)]++;
  const top = Math.max(...counts);
  const columns = counts.map((each, at) => {
    const from = start + at * width;
    const to = at === counts.length - 1 ? most : from + width - 1;
    const range = from === to ? number(from) : `${number(from)} to ${number(to)}`;
    const column = element("i", { title: `${range} ${name}: ${plural(each, "dialogue")}` });
    column.style.setProperty("--size", `${(100 * each) / top}%`);
    return column;
  });
  const plot = element("div", { className: "columns", role: "img" }, ...columns);
  const middle = `median ${number(median)}`;
  plot.ariaLabel = `${name} of a dialogue: from ${number(least)} to ${number(most)}, ${middle}`;
  const end = high < most ? `${number(start + (counts.length - 1) * width)} and more` : number(most);
  const ends = [number(start), end].map((text) => element("span", {}, text));
  const scale = element("div", { className: "scale", ariaHidden: "true" }, ...ends);
  const title = name[0].toUpperCase() + name.slice(1);
  return element("figure", {}, element("figcaption", {}, title, element("small", {}, middle)), plot, scale);
}

function drawBars({ kind, names, values }) {
  const counts = tally(names, values, shown);
  const bars = names.map((name, at) => {
    const bar = element("i");
    bar.style.setProperty("--size", `${(100 * counts[at]) / shown.length}%`);
    const share = `${number(counts[at])} · ${((100 * counts[at]) / shown.length).toFixed(1)}%`;
    return element("li", {}, element("bdi", {}, name), element("span", {}, share), bar);
  });
  const title = element("figcaption", {}, kind[0].toUpperCase() + kind.slice(1));
  return element("figure", {}, title, element("ul", { className: "bars" }, ...bars));
}

function tally(names, values, dialogues) {
  const counts = names.map(() => 0);
  for (const dialogue of dialogues) names.forEach((_, at) => (counts[at] += (values[dialogue] >> at) & 1));
  return counts;
}

function extent(values, dialogues) {
  let [least, most] = [Infinity, 0];
  for (const dialogue of dialogues) {
    least = Math.min(least, values[dialogue]);
    most = Math.max(most, values[dialogue]);
  }
  return least > most ? [0, 0] : [least, most];
}

// The next of 1, 2, 5, 10, 20, 50, ...
function niceWidth(width) {
  const ten = 10 ** Math.max(0, Math.floor(Math.log10(width || 1)));
  return [1, 2, 5, 10].map((each) => each * ten).find((each) => each >= width) ?? 1;
}

// ---- Addresses: #id is the dialogue with that id, an empty one the overview

const addressOf = (dialogue) =>
  location.href.replace(/#.*/, "") + (dialogue < 0 ? "" : `#${encodeURIComponent(index.ids[dialogue])}`);

let later; // browsers refuse an address that changes with every repeat of a key

function step(dialogue) {
  clearTimeout(later);
  later = setTimeout(() => location.replace(addressOf(dialogue)), 200);
  open(dialogue);
}

function go(dialogue) {
  clearTimeout(later);
  body.pane = "dialogue";
  if (location.href === addressOf(dialogue)) open(dialogue);
  else location.href = addressOf(dialogue);
}

function followAddress() {
  const address = location.hash.slice(1);
  let dialogue;
  try {
    dialogue = numberOf.get(decodeURIComponent(address));
  } catch {} // not percent-encoded text
  dialogue ??= numberOf.get(address) ?? -1;
  if (dialogue >= 0) body.pane = "dialogue";
  else if (body.pane === "dialogue") body.pane = "list";
  if (dialogue !== current) open(dialogue);
  if (dialogue < 0 && address) {
    part("overview").querySelector("p").textContent = `No dialogue has the id ${address}.`;
  }
}

part("to-overview").onclick = () => {
  location.hash = "";
  body.pane = "overview";
  open(-1);
  part("overview").querySelector("h2").focus();
};
part("to-list").onclick = () => {
  body.pane = "list";
  list.focus();
};

(async () => {
  index = await unpack(part("index").textContent);
  count = index.ids.length;
  numberOf = new Map(index.ids.map((id, dialogue) => [id, dialogue]));
  part("more").open = matchMedia("(min-width: 50rem) and (min-height: 40rem)").matches;
  makeFilters();
  refresh();
  followAddress();
  addEventListener("hashchange", followAddress);
  performance.mark("parrot open");
  startSearch();
})();

// A worker: keeps the texts of its chunks and says which dialogues hold all words of a query.

const texts = new Map(); // dialogue number -> its text in lower case
let query = { serial: 0, words: [] };
let hits = [];

function holdsAll(number) {
  const text = texts.get(number);
  return query.words.every((word) => text.includes(word));
}

function search(next) {
  // Words that only grew longer can match nothing that they did not match before.
  const grew = (old) => next.words.some((word) => word.includes(old));
  const narrower = query.words.length && query.words.every(grew);
  const candidates = narrower ? hits : [...texts.keys()];
  query = next;
  hits = query.words.length ? candidates.filter(holdsAll) : [];
  postMessage({ serial: query.serial, hits });
}

async function read({ first, packed }) {
  const dialogues = await unpack(packed);
  const added = dialogues.map(({ id, messages, details, rejected }, offset) => {
    const contents = messages.map((message) => message.content);
    const parts = [id, details.topic ?? "", ...contents, rejected ?? ""];
    texts.set(first + offset, parts.join("\n").toLowerCase());
    return first + offset;
  });
  const found = query.words.length ? added.filter(holdsAll) : [];
  hits = hits.concat(found);
  postMessage({ serial: query.serial, hits: found, read: added.length });
}

onmessage = ({ data }) => (data.packed === undefined ? search(data) : read(data));

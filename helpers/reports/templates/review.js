"use strict";
// Marks labels and saves them as fixes.csv. It stores nothing outside the page: unsaved changes are lost when it closes.
const { classes, earlier } = JSON.parse(document.getElementById("data").textContent);
const cards = [...document.querySelectorAll(".card")];
const image = new Map(cards.map((card) => [card, JSON.parse(card.dataset.image)]));
const large = document.getElementById("large");
const save = document.getElementById("save");
const REMOVE = "remove";
let current = cards[0];
let saved = true;

const tickOf = (card) => card.querySelector("input");
const menuOf = (card) => card.querySelector("select");

// The menu is filled at the first tick: some data sets have a thousand classes, and most cards are never ticked.
function fill(card) {
  const menu = menuOf(card);
  if (menu.options.length) return;
  const { label, suggested } = image.get(card);
  menu.add(new Option("choose the correct label", ""));
  classes.forEach((name, index) => { if (name !== label) menu.add(new Option(name, String(index))); });
  menu.add(new Option("remove the image", REMOVE));
  menu.value = classes.includes(suggested) && suggested !== label ? String(classes.indexOf(suggested)) : "";
}

function mark(card, on, value) {
  fill(card);
  tickOf(card).checked = on;
  if (value !== undefined) menuOf(card).value = value;
  saved = false;
  show(card);
}

function show(card) {
  const on = tickOf(card).checked;
  const menu = menuOf(card);
  menu.disabled = !on;
  card.classList.toggle("marked", on);
  card.classList.toggle("removed", on && menu.value === REMOVE);
  card.classList.toggle("open", on && menu.value === "");
  showCounts();
  if (large.open) enlarge(card);
}

function showCounts() {
  const chosen = cards.filter((card) => tickOf(card).checked).map((card) => menuOf(card).value);
  const removed = chosen.filter((value) => value === REMOVE).length;
  const open = chosen.filter((value) => value === "").length;
  const corrected = chosen.length - removed - open;
  const counts = [];
  if (corrected) counts.push(`${corrected} label${corrected > 1 ? "s" : ""} to correct`);
  if (removed) counts.push(`${removed} image${removed > 1 ? "s" : ""} to remove`);
  if (open) counts.push(`${open} still without a label`);
  if (earlier.length && chosen.length) counts.push(`${earlier.length} from before`);
  document.getElementById("count").textContent = counts.join(", ") || "Nothing is marked yet";
  document.getElementById("next").hidden = true;
  save.disabled = corrected + removed === 0;
}

// Every field is quoted, so commas, quotes and line breaks in names stay the same.
function asCsv(rows) {
  const quote = (text) => `"${text.replaceAll('"', '""')}"`;
  return rows.map((row) => row.map(quote).join(",") + "\r\n").join("");
}

function fixes() {
  const rows = new Map(earlier.map((row) => [row[0], row]));
  for (const card of cards) {
    const value = menuOf(card).value;
    if (!tickOf(card).checked || value === "") continue;
    const { path, sha256 } = image.get(card);
    rows.set(path, [path, value === REMOVE ? "" : classes[Number(value)], sha256]);
  }
  return [["path", "label", "sha256"], ...rows.values()];
}

function download() {
  if (save.disabled) return;
  const address = URL.createObjectURL(new Blob([asCsv(fixes())], { type: "text/csv;charset=utf-8" }));
  Object.assign(document.createElement("a"), { href: address, download: "fixes.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  saved = true;
  document.getElementById("next").hidden = false;
}

function enlarge(card) {
  const thumbnail = card.querySelector("img");
  if (!thumbnail) return;
  const { path, label } = image.get(card);
  const menu = menuOf(card);
  const to = tickOf(card).checked ? ` → ${menu.selectedOptions[0].text}` : "";
  large.querySelector("img").src = thumbnail.src;
  large.querySelector("p").textContent = `${label}${to} · ${card.querySelector(".seen").innerText} · ${path}`;
  if (!large.open) large.showModal();
}

function go(card) {
  if (!card) return;
  current = card;
  if (large.open) enlarge(card);
  else tickOf(card).focus();
  card.scrollIntoView({ block: "nearest" });
}

// The card in the next row, up or down, whose middle is nearest.
function inNextRow(step) {
  const from = current.getBoundingClientRect();
  const places = visible().map((card) => [card, card.getBoundingClientRect()])
    .filter(([, to]) => step * (to.top - from.top) > from.height / 2);
  const nearest = Math.min(...places.map(([, to]) => step * (to.top - from.top)));
  const row = places.filter(([, to]) => step * (to.top - from.top) < nearest + from.height / 2);
  row.sort(([, a], [, b]) => Math.abs(a.left - from.left) - Math.abs(b.left - from.left));
  return row[0]?.[0];
}

const visible = () => cards.filter((card) => card.offsetParent);
const neighbour = (step) => { const shown = visible(); return shown[shown.indexOf(current) + step]; };

const keys = {
  ArrowLeft: () => go(neighbour(-1)),
  ArrowRight: () => go(neighbour(1)),
  ArrowUp: () => go(inNextRow(-1)),
  ArrowDown: () => go(inNextRow(1)),
  Enter: () => (large.open ? large.close() : enlarge(current)),
  " ": () => mark(current, !tickOf(current).checked),
  Delete: () => mark(current, true, REMOVE),
};

function pick(number) {
  const same = classes[number] === image.get(current).label;
  mark(current, !same, same ? undefined : String(number));
}

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "s") { event.preventDefault(); download(); return; }
  if (!current || event.ctrlKey || event.metaKey || event.altKey) return;
  const inCard = event.target.closest?.(".card, dialog") || event.target === document.body;
  if (!inCard || event.target.matches("select")) return;
  const number = Number(event.key) - 1;
  const act = keys[event.key] ?? (classes.length <= 9 && classes[number] !== undefined && (() => pick(number)));
  if (act) { event.preventDefault(); act(); }
});

for (const card of cards) {
  card.addEventListener("focusin", () => { current = card; });
  card.querySelector(".picture").addEventListener("click", () => { go(card); enlarge(card); });
  tickOf(card).addEventListener("change", (event) => mark(card, event.target.checked));
  menuOf(card).addEventListener("change", () => { saved = false; show(card); });
}
for (const id of ["hide-test", "only-marked"]) {
  document.getElementById(id)?.addEventListener("change", (event) => document.body.classList.toggle(id, event.target.checked));
}
large.addEventListener("click", () => large.close());
large.addEventListener("close", () => current && tickOf(current).focus());
save.addEventListener("click", download);
addEventListener("beforeunload", (event) => { if (!saved && !save.disabled) event.preventDefault(); });

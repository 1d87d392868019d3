// The picture with what the user draws on it and what answers point at. `props.value` is {picture, marks, selected,
// next}; boxes and points are in pixels of the picture, whatever its size on the screen.
const stage = element.querySelector(".rt-stage");
const svg = stage.querySelector("svg");
const image = stage.querySelector(".rt-image");
const drawnGroup = stage.querySelector(".rt-drawn");
const outlineGroup = stage.querySelector(".rt-outlines");
const list = stage.querySelector(".rt-marks");
const SVG = "http://www.w3.org/2000/svg";
const LEAST = 5; // screen pixels below which a drag is a click
const TALL = 20; // of badges and labels, in screen pixels

let marks = [], selected = null, next = 1, width = 1, height = 1, tool = "box", gesture = null, pinned = [];
let badges = []; // [x, y, width] of the marks' badges; labels of answers' boxes keep clear of them

const clamp = (value, high) => Math.max(0, Math.min(value, high));
const unit = () => width / (svg.getBoundingClientRect().width || width); // picture pixels a screen pixel
const find = (number) => marks.find((mark) => mark.number === number);

function make(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.appendChild(node);
  return node;
}

function place(event) {
  const area = svg.getBoundingClientRect();
  const x = ((event.clientX - area.left) / area.width) * width;
  const y = ((event.clientY - area.top) / area.height) * height;
  return [clamp(x, width), clamp(y, height)];
}

function read() {
  const value = props.value || {};
  marks = (value.marks || []).map((mark) => ({ ...mark }));
  selected = value.selected ?? null;
  next = Math.max(value.next || 1, ...marks.map((mark) => mark.number + 1));
  draw();
}

function commit() {
  props.value = { picture: props.value?.picture, marks: marks.map((mark) => ({ ...mark })), selected, next };
  draw();
  trigger("input");
}

const badgeWidth = (text) => (10 + 7.5 * text.length) * unit();

function drawBadge(group, text, x, y) {
  const size = unit();
  const back = make("rect", { class: "rt-badge", x, y, width: badgeWidth(text), height: TALL * size, rx: 3 * size }, group);
  make("text", { class: "rt-badge-text", x: x + 5 * size, y: y + 14.5 * size, "font-size": 13 * size }, group).textContent = text;
  return back;
}

// Where the label of an answer's box goes: beside or inside of it, where nothing in `taken` stands yet.
function labelPlace([x1, y1, x2, y2], wide, taken) {
  const tall = TALL * unit(), left = clamp(x1, width - wide), right = clamp(x2 - wide, width - wide);
  const places = [
    [left, y2], [right, y2], [left, y1 - tall], [right, y1 - tall], [left, y2 - tall], [left, y1],
    [x2, y1], [x1 - wide, y1], [x2, y2 - tall], [x1 - wide, y2 - tall],
  ];
  const inside = places.filter(([x, y]) => x >= 0 && x + wide <= width && y >= 0 && y + tall <= height);
  const slack = 4 * unit(); // boxes of one thing differ by a pixel or two
  const apart = (x, y, [a, b, w]) => x + wide <= a || a + w <= x || y + tall <= b + slack || b + tall <= y + slack;
  const free = ([x, y]) => taken.every((other) => apart(x, y, other));
  return inside.find(free) || inside[0] || [left, clamp(y1, height - tall)];
}

function drawMark(mark) {
  const chosen = mark.number === selected;
  const group = make("g", { class: "rt-mark", "data-number": mark.number }, drawnGroup);
  if (chosen) group.dataset.selected = "";
  const size = unit();
  let [left, top] = mark.box_xyxy || mark.point_xy;
  if (mark.box_xyxy) {
    const [x1, y1, x2, y2] = mark.box_xyxy;
    const edges = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    make("rect", { class: "rt-box-shape", ...edges }, group);
    make("rect", { class: "rt-grab", "data-grab": mark.number, ...edges }, group);
  } else {
    make("circle", { class: "rt-dot", "data-grab": mark.number, cx: left, cy: top, r: 6 * size }, group);
    left += 8 * size;
  }
  const text = mark.label ? `${mark.number} ${mark.label}` : `${mark.number}`;
  const wide = badgeWidth(text), tall = TALL * size;
  const x = clamp(left, width - wide), above = mark.box_xyxy ? top - tall : top - tall / 2;
  const y = clamp(above < 0 && mark.box_xyxy ? top : above, height - tall);
  drawBadge(group, text, x, y).dataset.grab = mark.number;
  badges.push([x, y, wide]);
  if (chosen && mark.box_xyxy) {
    const [x1, y1, x2, y2] = mark.box_xyxy;
    [[x1, y1, "nwse"], [x2, y1, "nesw"], [x2, y2, "nwse"], [x1, y2, "nesw"]].forEach(([cx, cy, turn], corner) =>
      make("circle", { class: "rt-handle", "data-corner": corner, "data-handle": mark.number, cx, cy, r: 6 * size, style: `cursor: ${turn}-resize` }, group));
  }
}

function drawRow(mark) {
  const row = document.createElement("li");
  row.dataset.number = mark.number;
  if (mark.number === selected) row.setAttribute("aria-current", "true");
  const button = (text, title, action, name) => {
    const node = document.createElement("button");
    node.type = "button";
    node.textContent = text;
    node.title = title;
    node.className = name;
    node.addEventListener("click", () => { selected = mark.number; action(); });
    row.appendChild(node);
  };
  const chip = `[${mark.number}]`;
  button(chip, `Put ${chip} into the question`, () => { write(chip, false); commit(); }, "rt-put");
  const label = document.createElement("input");
  label.value = mark.label || "";
  label.placeholder = mark.box_xyxy ? "name this box" : "name this point";
  label.maxLength = 40;
  label.setAttribute("aria-label", `Name of ${chip}`);
  label.addEventListener("change", () => {
    const own = find(mark.number); // the list outlives the objects it was drawn from
    if (own) own.label = label.value.trim();
    commit();
  });
  row.appendChild(label);
  const what = mark.box_xyxy ? `What is in ${chip}?` : `What is at ${chip}?`;
  button("What?", what, () => { write(what, true); commit(); }, "rt-what");
  button("Read", `Read ${chip}.`, () => { write(`Read ${chip}.`, true); commit(); }, "rt-read");
  button("✕", `Delete ${chip}`, () => remove(mark.number), "rt-delete");
  list.appendChild(row);
}

function draw() {
  drawnGroup.replaceChildren();
  badges = [];
  marks.forEach(drawMark);
  if (gesture?.kind === "new" && gesture.box) drawMark({ number: next, box_xyxy: gesture.box, label: "" });
  if (!list.contains(document.activeElement) || document.activeElement.tagName !== "INPUT" || list.children.length !== marks.length) {
    list.replaceChildren();
    marks.forEach(drawRow);
  }
}

function drawOutlines() {
  outlineGroup.replaceChildren();
  const rows = Object.entries(props.outlines || {}).flatMap(([slot, own]) => own.map((row) => ({ ...row, slot })));
  const part = (name, row) => {
    const group = make("g", { class: name, "data-box": row.id, "data-slot": row.slot, "data-kind": row.kind }, outlineGroup);
    if (row.last) group.dataset.last = "";
    return group;
  };
  for (const row of rows) {
    const [x1, y1, x2, y2] = row.box_xyxy;
    make("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1 }, part("rt-outline", row));
  }
  const taken = [...badges];
  for (const row of rows) { // after all boxes, so that no line runs through them
    const wide = badgeWidth(row.text), [x, y] = labelPlace(row.box_xyxy, wide, taken);
    drawBadge(part("rt-label", row), row.text, x, y);
    if (row.last) taken.push([x, y, wide]); // the others show when they are pointed at, one at a time
  }
  light(pinned);
}

function load() {
  width = props.width || 1;
  height = props.height || 1;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.aspectRatio = `${width} / ${height}`;
  svg.style.maxWidth = `calc(var(--rt-tallest) * ${width / height})`;
  image.setAttribute("width", width);
  image.setAttribute("height", height);
  image.setAttribute("href", props.picture || "");
  stage.toggleAttribute("data-empty", !props.picture);
  stage.querySelector(".rt-size").textContent = `${width} × ${height}`;
  gesture = null;
  pinned = [];
  read();
  drawOutlines();
}

function remove(number) {
  marks = marks.filter((mark) => mark.number !== number);
  if (selected === number) selected = marks.length ? marks[marks.length - 1].number : null;
  const box = document.querySelector("#rt-question textarea");
  if (box?.value.includes(`[${number}]`)) fill(box, box.value.replaceAll(`[${number}]`, "").replace(/ {2,}/g, " "));
  commit();
}

function fill(box, text) {
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(box, text);
  box.dispatchEvent(new Event("input", { bubbles: true }));
}

function write(text, whole) {
  const box = document.querySelector("#rt-question textarea");
  if (!box) return;
  const at = box.selectionEnd ?? box.value.length;
  const before = box.value.slice(0, at), space = before && !/\s$/.test(before) ? " " : "";
  fill(box, whole ? text : `${before}${space}${text}${box.value.slice(at)}`);
  const end = whole ? text.length : at + space.length + text.length;
  box.focus();
  box.setSelectionRange(end, end);
}

svg.addEventListener("pointerdown", (event) => {
  if (event.button > 0 || gesture) return;
  event.preventDefault();
  svg.focus({ preventScroll: true });
  svg.setPointerCapture(event.pointerId);
  const start = place(event), target = event.target;
  if (target.dataset.handle) {
    const [x1, y1, x2, y2] = find(+target.dataset.handle).box_xyxy;
    const anchor = [[x2, y2], [x1, y2], [x1, y1], [x2, y1]][+target.dataset.corner];
    gesture = { kind: "resize", number: +target.dataset.handle, anchor, before: [x1, y1, x2, y2] };
  } else if (target.dataset.grab) {
    selected = +target.dataset.grab;
    const mark = find(selected);
    gesture = { kind: "move", number: selected, start, before: [...(mark.box_xyxy || mark.point_xy)] };
  } else {
    gesture = { kind: "new", start, box: null };
  }
  gesture.pointer = event.pointerId;
  draw();
});

svg.addEventListener("pointermove", (event) => {
  if (!gesture || gesture.pointer !== event.pointerId) return;
  const [x, y] = place(event);
  const between = ([a, b]) => [Math.min(a, x), Math.min(b, y), Math.max(a, x), Math.max(b, y)];
  if (gesture.kind === "new") gesture.box = tool === "box" ? between(gesture.start) : null;
  if (gesture.kind === "resize") find(gesture.number).box_xyxy = between(gesture.anchor);
  if (gesture.kind === "move") shift(find(gesture.number), gesture.before, x - gesture.start[0], y - gesture.start[1]);
  draw();
});

function shift(mark, before, right, down) {
  if (mark.point_xy) {
    mark.point_xy = [clamp(before[0] + right, width), clamp(before[1] + down, height)];
  } else {
    const [x1, y1, x2, y2] = before;
    const dx = Math.min(Math.max(right, -x1), width - x2), dy = Math.min(Math.max(down, -y1), height - y2);
    mark.box_xyxy = [x1 + dx, y1 + dy, x2 + dx, y2 + dy];
  }
}

function finish(event, given) {
  if (!gesture || gesture.pointer !== event.pointerId) return;
  const { kind, start, box, number, before } = gesture, least = LEAST * unit();
  gesture = null;
  const thin = (edges) => edges[2] - edges[0] < least || edges[3] - edges[1] < least;
  if (kind === "new" && given && tool === "point") {
    marks.push({ number: next, point_xy: place(event), label: "" });
    selected = next++;
  } else if (kind === "new" && given && box && !thin(box)) {
    marks.push({ number: next, box_xyxy: box, label: "" });
    selected = next++;
  } else if (kind === "new") {
    selected = null; // a click beside everything
  } else if (kind === "resize" && (!given || thin(find(number).box_xyxy))) {
    find(number).box_xyxy = before;
  }
  commit();
}
svg.addEventListener("pointerup", (event) => finish(event, true));
svg.addEventListener("pointercancel", (event) => finish(event, false));

svg.addEventListener("keydown", (event) => {
  const mark = find(selected);
  if (!mark) return;
  const step = (event.shiftKey ? 10 : 1) * Math.max(1, Math.round(unit()));
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (event.key === "Delete" || event.key === "Backspace") remove(selected);
  else if (moves[event.key]) { shift(mark, mark.box_xyxy || mark.point_xy, ...moves[event.key]); commit(); }
  else return;
  event.preventDefault();
});

stage.querySelectorAll(".rt-tools button[data-tool]").forEach((button) =>
  button.addEventListener("click", () => {
    tool = button.dataset.tool;
    stage.querySelectorAll(".rt-tools button[data-tool]").forEach((other) =>
      other.setAttribute("aria-pressed", String(other === button)));
  }));
stage.querySelector("[data-do=clear]").addEventListener("click", () => {
  [...marks].forEach((mark) => remove(mark.number));
});

// Words of answers and chips of questions carry the ids of their boxes; pointing at one lights up the other.
function light(ids) {
  outlineGroup.querySelectorAll("[data-box]").forEach((group) =>
    group.classList.toggle("on", ids.includes(group.dataset.box)));
  document.querySelectorAll("[data-boxes]").forEach((node) =>
    node.classList.toggle("on", node.dataset.boxes.split(" ").some((id) => ids.includes(id))));
}
const idsAt = (event) => {
  const words = event.target.closest?.("[data-boxes]"), outline = event.target.closest?.("[data-box]");
  return words ? words.dataset.boxes.split(" ") : outline && svg.contains(outline) ? [outline.dataset.box] : null;
};
for (const name of ["pointerover", "focusin"]) document.addEventListener(name, (event) => light(idsAt(event) || pinned));
document.addEventListener("click", (event) => {
  const words = event.target.closest?.("[data-boxes]");
  if (!words) return;
  const ids = words.dataset.boxes.split(" ");
  pinned = ids.join() === pinned.join() ? [] : ids;
  light(pinned);
});

new ResizeObserver(() => { draw(); drawOutlines(); }).observe(svg);
watch(["picture", "width", "height"], load);
watch("value", read);
watch("outlines", drawOutlines);
load();

// Where pictures come from. One is opened at a time: its file is uploaded, then an event tells the server, and only when
// that event is over (the page says so with "rt-picture-over") does the next one begin. What is chosen meanwhile waits;
// of several the last is opened. `props.value` is the choice: {name, size, path} of a file or {example: number}.
const picker = element.querySelector(".rt-picker");
const input = picker.querySelector("input[type=file]");
const drop = picker.querySelector(".rt-drop");
const webcam = picker.querySelector(".rt-webcam");
const video = picker.querySelector("video");

let waiting = null, opening = false, stream = null;

const say = (text) => { picker.querySelector(".rt-coming").textContent = text; };

function choose(choice) {
  if (!choice) return;
  waiting = choice;
  next();
}

async function next() {
  if (opening || !waiting) return;
  const choice = waiting;
  waiting = null;
  opening = true;
  say(`Opening ${choice.name ?? "an example"} ...`);
  props.value = choice instanceof File ? await uploaded(choice) : choice;
  trigger("upload");
}

// Without a path the server says what is wrong: the size, or that the file did not arrive.
async function uploaded(file) {
  const { name, size } = file, fits = size > 0 && size <= props.most_bytes;
  const sent = fits ? await upload(file).catch(() => null) : null;
  return { name, size, path: sent?.path ?? "" };
}

document.addEventListener("rt-picture-over", () => {
  opening = false;
  say("");
  next();
});

input.addEventListener("change", () => {
  choose(input.files[0]);
  input.value = ""; // or the same file could not be chosen again
});

// Everywhere on the page: a browser would leave it to show a dropped picture.
const holdsFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  drop.classList.remove("over");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find(({ type }) => type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  choose(file);
});

async function paste() {
  try {
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((name) => name.startsWith("image/"));
      if (type) return choose(new File([await item.getType(type)], `pasted.${type.slice(6)}`, { type }));
    }
    say("There is no picture in the clipboard.");
  } catch {
    say("The browser does not give this page the clipboard; Ctrl+V works.");
  }
}

async function openWebcam() {
  if (stream) return;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    return say("The browser does not give this page a webcam.");
  }
  video.srcObject = stream;
  webcam.hidden = false;
}

function closeWebcam() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = video.srcObject = null;
  webcam.hidden = true;
}

function takePicture() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  if (!canvas.width) return; // the webcam has shown nothing yet
  canvas.getContext("2d").drawImage(video, 0, 0);
  closeWebcam();
  canvas.toBlob((blob) => choose(new File([blob], "webcam.jpg", { type: "image/jpeg" })), "image/jpeg", 0.95);
}

const ways = { paste, webcam: openWebcam, take: takePicture, close: closeWebcam };
picker.querySelectorAll("[data-way]").forEach((button) => button.addEventListener("click", ways[button.dataset.way]));

props.examples.forEach(({ title, picture }, example) => {
  const button = document.createElement("button"), image = document.createElement("img");
  button.type = "button";
  button.className = "rt-example";
  [image.src, image.alt] = [picture, ""];
  button.append(image, Object.assign(document.createElement("span"), { textContent: title }));
  button.addEventListener("click", () => choose({ example }));
  picker.querySelector(".rt-examples").append(button);
});

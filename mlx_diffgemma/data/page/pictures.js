// Pictures that are to be sent: pasted, dropped, chosen or taken, made small, and shown.
//
// They are drawn on canvases, never loaded by an address: the page's policy allows none.

import { button, find, make } from "./dom.js";

// Pixels of the longer side, and characters of the address that holds a picture: a phone's photo
// has more, and the model sees no more of it.
const LONGEST = 1344, MOST_CHARACTERS = 400_000;

// Pictures of one message.
export const MOST_PICTURES = 8;

const THUMBNAIL = 96; // pixels of its height

// A canvas of a picture, no higher or wider than `most`, over white where it is transparent.
function drawn(bitmap, most, canvas = document.createElement("canvas")) {
  const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(scale * bitmap.width));
  canvas.height = Math.max(1, Math.round(scale * bitmap.height));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// The data: address of a file's picture, upright and small. What a camera notes beside it is lost.
async function reduced(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  try {
    for (let longest = LONGEST; ; longest /= 2) {
      const canvas = drawn(bitmap, longest);
      const ways = [["image/png"], ["image/jpeg", 0.9], ["image/jpeg", 0.7]];
      for (const way of ways) {
        const address = canvas.toDataURL(...way);
        if (address.length <= MOST_CHARACTERS) return address;
      }
    }
  } finally {
    bitmap.close();
  }
}

// A small picture with a name for those who do not see it.
export function thumbnail(address, name) {
  const canvas = make("canvas", { className: "thumbnail", width: THUMBNAIL, height: THUMBNAIL });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name);
  const bytes = Uint8Array.from(atob(address.split(",")[1]), (each) => each.charCodeAt(0));
  createImageBitmap(new Blob([bytes])).then((bitmap) => {
    drawn(bitmap, 3 * THUMBNAIL, canvas);
    bitmap.close();
  }, () => canvas.setAttribute("aria-label", `${name}, which cannot be shown`));
  return canvas;
}

// What waits to be sent with the next message.
export class Tray {
  // `say` tells the user something, `sees` gives whether the model reads pictures.
  constructor({ say, sees }) {
    this.say = say;
    this.sees = sees;
    this.addresses = [];
    this.reading = 0;
    this.list = find("pictures");
    for (const [open, input] of [["picture-add", "picture-file"], ["picture-take", "picture-camera"]]) {
      find(open).addEventListener("click", () => find(input).click());
      find(input).addEventListener("change", ({ target }) => {
        const files = [...target.files];
        target.value = ""; // the same file may be chosen again
        this.add(files);
      });
    }
    find("message").addEventListener("paste", (event) => {
      const files = pictures(event.clipboardData);
      // What is copied from a text has a picture of itself beside it.
      if (!files.length || event.clipboardData.getData("text/plain")) return;
      event.preventDefault();
      this.add(files);
    });
    const area = find("panel-chat");
    for (const name of ["dragover", "drop"]) {
      area.addEventListener(name, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault(); // or the browser leaves the page for the file
        if (name === "drop") this.add([...event.dataTransfer.files]);
      });
    }
  }

  // Takes pictures of files; tells of those that are none.
  async add(files) {
    if (!this.sees()) {
      this.say("This model reads text alone.");
      return;
    }
    for (const file of files) {
      if (this.addresses.length + this.reading >= MOST_PICTURES) {
        this.say(`A message has ${MOST_PICTURES} pictures at most.`);
        break;
      }
      this.reading += 1;
      try {
        this.addresses.push(await reduced(file));
        this.say("");
      } catch {
        this.say(`${file.name || "This"} is no picture that this browser reads.`);
      } finally {
        this.reading -= 1;
      }
      this.draw();
    }
    find("message").focus();
  }

  // Gives what is to be sent, and is empty then.
  take() {
    const taken = this.addresses;
    this.addresses = [];
    this.draw();
    return taken;
  }

  draw() {
    this.list.hidden = this.addresses.length === 0;
    this.list.replaceChildren(...this.addresses.map((address, i) => {
      const gone = button("×", () => {
        this.addresses.splice(i, 1);
        this.draw();
        find("message").focus();
      }, { className: "plain gone", "aria-label": `Remove picture ${i + 1}` });
      return make("li", {}, thumbnail(address, `Picture ${i + 1}, to be sent`), gone);
    }));
  }
}

function pictures(transfer) {
  return [...transfer.files].filter((each) => each.type.startsWith("image/"));
}

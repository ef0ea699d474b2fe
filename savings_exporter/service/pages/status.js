// Keeps the page fresh: fetches it every second while it is visible, and changes what has changed.
"use strict";

const PAUSE_MILLISECONDS = 1000;

function change(shown, fresh) {
  if (shown.nodeType !== Node.ELEMENT_NODE) {
    if (shown.nodeValue !== fresh.nodeValue) shown.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (shown.getAttribute(name) !== value) shown.setAttribute(name, value);
  }
  for (const { name } of [...shown.attributes]) {
    // What a reader has opened stays open.
    if (!fresh.hasAttribute(name) && name !== "open") shown.removeAttribute(name);
  }
  const before = [...shown.childNodes], after = [...fresh.childNodes];
  if (before.length === after.length && before.every((node, place) => node.nodeName === after[place].nodeName)) {
    before.forEach((node, place) => change(node, after[place]));
  } else {
    shown.replaceChildren(...after);
  }
}

async function refresh() {
  const lost = document.getElementById("lost");
  try {
    if (!document.hidden) {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of ["top", "content", "bottom"]) {
        change(document.getElementById(part), fresh.getElementById(part));
      }
      document.title = fresh.title;
      lost.hidden = true;
    }
  } catch {
    lost.hidden = false;
  }
  setTimeout(refresh, PAUSE_MILLISECONDS);
}

setTimeout(refresh, PAUSE_MILLISECONDS);

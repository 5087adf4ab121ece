// What tokens tell under the pointer, and as arrow keys walk through them.

/**
 * @typedef {import("./answer.js").Answer} Answer
 */

/**
 * @param {HTMLElement} talk
 * @param {HTMLElement} tip
 * @param {HTMLElement} announcer says it to a screen reader
 * @param {(element: Element | null) => Answer | undefined} answerOf the answer that an element is of
 */
export function watchTokens(talk, tip, announcer, answerOf) {
  /** @type {HTMLElement | null} */
  let current = null;

  /** @param {HTMLElement | null} span */
  function show(span) {
    current?.classList.remove("current");
    current = span;
    const answer = span && answerOf(span.closest(".answer"));
    tip.hidden = !answer;
    if (!span || !answer) return;
    span.classList.add("current");
    const { title, text, chance } = answer.tell(span);
    tip.replaceChildren(line("strong", title), line("code", text), ...(chance ? [line("span", `probability ${chance}`)] : []));
    place(tip, span);
  }

  talk.addEventListener("pointermove", ({ target, clientX }) => {
    if (!(target instanceof Element)) return;
    const bars = target.closest(".bars");
    const token = bars ? answerOf(bars.closest(".answer"))?.bars.tokenAt(clientX) : undefined;
    const span = token === undefined ? target.closest(".token") : answerOf(target.closest(".answer"))?.spanOfToken(token);
    if (span !== current) show(/** @type {HTMLElement | null} */ (span ?? null));
  });
  talk.addEventListener("pointerleave", () => show(null));
  talk.addEventListener("focusout", () => show(null));
  talk.addEventListener("scroll", () => show(null));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
  });
  talk.addEventListener("keydown", (event) => {
    const body = event.target instanceof HTMLElement && event.target.matches(".tokens") ? event.target : null;
    const spans = /** @type {HTMLElement[]} */ (Array.from(body?.querySelectorAll(".token") ?? []));
    if (!spans.length) return;
    const now = current ? spans.indexOf(current) : -1;
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const span = spans[Math.min(Math.max(next, 0), spans.length - 1)];
    span.scrollIntoView({ block: "nearest" });
    show(span);
    announcer.textContent = `${span.textContent}, ${tip.querySelector("strong")?.textContent}`;
  });
}

/**
 * @param {string} tag
 * @param {string} text
 */
function line(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

/**
 * Puts the tip over a token, or under it where there is no room, within the window.
 * @param {HTMLElement} tip
 * @param {HTMLElement} span
 */
function place(tip, span) {
  const around = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, around.left + around.width / 2 - width / 2), innerWidth - width - 8);
  const top = around.top - height - 8 < 8 ? around.bottom + 8 : around.top - height - 8;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${top}px`);
}

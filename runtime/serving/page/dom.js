// Elements: how they are made and found.

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} properties
 * @returns {HTMLElementTagNameMap[K]}
 */
export function made(tag, properties) {
  const element = document.createElement(tag);
  const { htmlFor, ...rest } = properties;
  if (htmlFor) element.setAttribute("for", htmlFor);
  return Object.assign(element, rest);
}

/** @param {string} id */
export function at(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** @param {string} id */
export function field(id) {
  return /** @type {HTMLTextAreaElement} */ (at(id));
}

/**
 * @param {string} id
 * @param {string} event
 * @param {(event: Event) => void} heard
 */
export function on(id, event, heard) {
  at(id).addEventListener(event, heard);
}

/**
 * Makes a field as high as its text, up to a third of the window.
 * @param {HTMLTextAreaElement} area
 */
export function fit(area) {
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${Math.min(area.scrollHeight + 2, innerHeight / 3)}px`);
}

// What stands around the answers: the theme, and the settings that a narrow screen hides.
import { at, on } from "./dom.js";

const THEMES = ["system", "light", "dark"];

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "system";
  at("theme").textContent = { light: "Light", dark: "Dark" }[theme] ?? "Auto";
  at("theme").setAttribute("aria-label", `Colour theme: ${theme}`);
}

/** Makes the buttons of the top work. */
export function listenToFrame() {
  on("theme", "click", () => {
    const { dataset } = document.documentElement;
    dataset.theme = THEMES[(THEMES.indexOf(dataset.theme ?? "system") + 1) % THEMES.length];
    try {
      localStorage.setItem("mythos-edge:theme", dataset.theme);
    } catch {
      // then it is for this time only
    }
    showTheme();
  });
  on("open-settings", "click", () => {
    const open = document.body.classList.toggle("settings-open");
    at("open-settings").setAttribute("aria-expanded", String(open));
  });
  showTheme();
}

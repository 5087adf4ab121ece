// The colour theme, set before anything is drawn: light, dark, or as the system has it.
(() => {
  const NAME = "mythos-edge:theme";
  let theme = "system";
  try {
    theme = localStorage.getItem(NAME) ?? theme;
  } catch {
    // without a store it is the system's
  }
  document.documentElement.dataset.theme = theme;
})();

// Images in a row: one Tab stop, then arrows.
for (const strip of document.querySelectorAll(".strip")) {
  strip.addEventListener("keydown", event => {
    const steps = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity}[event.key];
    const all = [...strip.children], from = all.indexOf(document.activeElement);
    if (!steps || from < 0) return;
    const to = Math.min(Math.max(from + steps, 0), all.length - 1);
    all[from].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
    event.preventDefault();
  });
}

// Sets the kept theme before the first paint; the only script that is not a module, so that nothing flashes.
try {
  const theme = localStorage.getItem("nanochat.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  /* no storage: the system's preference holds */
}

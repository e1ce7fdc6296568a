// What a line that begins with / does. A line that is none of these is an ordinary message.

export const COMMANDS = [
  ["/temperature", "show it, or set it: 0 takes the most likely token each time, 2 is wild"],
  ["/topk", "show it, or set it: sample from this many of the most likely tokens, 0 = all"],
  ["/clear", "a new conversation; the old one stays in the list"],
  ["/help", "the commands and keys"],
];

/** Returns what to say, "" for nothing to say, or null where the line is no command. */
export function command(line, {settings, clear, help}) {
  const [name, value, ...more] = line.trim().split(/\s+/);
  switch (name.toLowerCase()) {
    case "/temperature":
      return number("temperature", "Temperature", value, more, 0, 2, settings);
    case "/topk":
      return number("top_k", "Top-k", value, more, 0, 200, settings, true);
    case "/clear":
      clear();
      return "";
    case "/help":
      help();
      return "";
    default:
      return null;
  }
}

function number(name, label, value, more, low, high, settings, whole = false) {
  if (value === undefined) return `${label} is ${settings.get(name)}.`;
  const given = Number(value);
  if (more.length || !(given >= low && given <= high) || (whole && !Number.isInteger(given)))
    return `${label} is ${whole ? "a whole" : "a"} number from ${low} to ${high}.`;
  settings.set(name, given);
  return `${label} is now ${given}.`;
}

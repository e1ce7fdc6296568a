// Code in colours: the languages that the page knows.

import core from "./vendor/highlight-core.min.js";
import bash from "./vendor/highlight-bash.min.js";
import c from "./vendor/highlight-c.min.js";
import cpp from "./vendor/highlight-cpp.min.js";
import css from "./vendor/highlight-css.min.js";
import diff from "./vendor/highlight-diff.min.js";
import go from "./vendor/highlight-go.min.js";
import java from "./vendor/highlight-java.min.js";
import javascript from "./vendor/highlight-javascript.min.js";
import json from "./vendor/highlight-json.min.js";
import python from "./vendor/highlight-python.min.js";
import rust from "./vendor/highlight-rust.min.js";
import sql from "./vendor/highlight-sql.min.js";
import typescript from "./vendor/highlight-typescript.min.js";
import xml from "./vendor/highlight-xml.min.js";
import yaml from "./vendor/highlight-yaml.min.js";

for (const [name, language] of Object.entries({
  bash,
  c,
  cpp,
  css,
  diff,
  go,
  java,
  javascript,
  json,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
})) {
  core.registerLanguage(name, language);
}

/** Code as HTML, still to be sanitised; null where the language is not known, or the code is long. */
export function highlighted(code, language) {
  if (!core.getLanguage(language) || code.length > 20000) return null;
  return core.highlight(code, {language, ignoreIllegals: true}).value;
}

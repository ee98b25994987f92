"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
$("theme").addEventListener("click", () => {
  const dark = $("theme").getAttribute("aria-pressed") !== "true";
  $("theme").setAttribute("aria-pressed", String(dark));
  document.documentElement.dataset.theme = dark ? "dark" : "light";
});
if (matchMedia("(prefers-color-scheme: dark)").matches) $("theme").setAttribute("aria-pressed", "true");

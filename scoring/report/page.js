// Finding, sorting and opening prompts. The page is whole without it.
const list = document.getElementById("list"), prompts = [...list.children];
const find = document.getElementById("find"), sort = document.getElementById("sort");
const up = document.getElementById("up"), open = document.getElementById("open");
const texts = prompts.map(prompt => prompt.textContent.toLowerCase());
const shown = () => [...list.children].filter(prompt => !prompt.hidden);

function arrange() {
  const words = find.value.toLowerCase().trim();
  prompts.forEach((prompt, i) => prompt.hidden = !texts[i].includes(words));
  const key = sort.value, way = key == "n" || up.checked ? 1 : -1;
  const value = prompt => Number(prompt.dataset[key] ?? -99);  // a yield that is not known
  const order = (a, b) => way * (value(a) - value(b)) || a.dataset.n - b.dataset.n;
  list.append(...[...prompts].sort(order));
  document.getElementById("count").value = `${shown().length} of ${prompts.length} prompts`;
}

find.oninput = sort.onchange = up.onchange = arrange;

open.onclick = () => {
  const any = shown().some(prompt => !prompt.open);
  shown().forEach(prompt => prompt.open = any);
  open.textContent = any ? "close all" : "open all";
};

document.onkeydown = event => {
  const target = event.target;
  const typing = /INPUT|SELECT|TEXTAREA/.test(target.tagName)
    && !/checkbox|radio/.test(target.type);
  if (event.key == "Escape" && target == find) { find.value = ""; arrange(); find.blur(); }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key == "/") { event.preventDefault(); find.focus(); }
  if (event.key == "j" || event.key == "k") {
    const all = shown(), here = all.indexOf(document.activeElement.closest(".prompt"));
    const next = Math.min(all.length - 1, Math.max(0, here + (event.key == "j" ? 1 : -1)));
    if (all[next]) all[next].querySelector("summary").focus();
  }
};

arrange();

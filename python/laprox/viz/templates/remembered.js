(() => {
  "use strict";
  const box = document.getElementById("text"), tip = document.getElementById("tip"), canvas = tip.querySelector("canvas");
  const cells = [...box.getElementsByTagName("i")], levels = cells.map((cell) => cell.className);
  const index = new Map(cells.map((cell, i) => [cell, i]));
  const stride = Number(box.dataset.stride), layers = JSON.parse(box.dataset.layers);
  const starts = box.dataset.starts.split(" ").map(Number);
  const total = layers.reduce((sum, [, heads]) => sum + heads, 0), widest = Math.max(...layers.map(([, heads]) => heads));
  let bits = null, here = -1;

  // One row of bits per pair of a layer and a KV head, one bit per cell that something holds.
  const packed = Uint8Array.from(atob(box.dataset.held), (c) => c.charCodeAt(0));
  const unpacked = new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  unpacked.then((buffer) => { bits = new Uint8Array(buffer); document.documentElement.dataset.ready = "1"; });
  const holds = (pair, cell) => (bits[pair * stride + (cell >> 3)] >> (7 - (cell & 7))) & 1;

  function draw(cell) {
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
    const step = Math.max(3, Math.min(14, Math.floor(230 / layers.length), Math.floor(230 / widest))), scale = window.devicePixelRatio || 1;
    const left = step >= 9 ? 22 : 0;
    canvas.width = (left + widest * step) * scale;
    canvas.height = layers.length * step * scale;
    canvas.style.width = `${left + widest * step}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = `10px ${colour("--font")}`;
    context.textBaseline = "middle";
    let pair = 0, count = 0;
    layers.forEach(([layer, heads], y) => {
      context.fillStyle = colour("--muted");
      if (left) context.fillText(layer, 0, (y + 0.5) * step);
      for (let x = 0; x < heads; x++, pair++) {
        const held = holds(pair, cell);
        count += held;
        context.fillStyle = colour(held ? "--l7" : "--rule");
        context.fillRect(left + x * step, y * step, step - 1, step - 1);
      }
    });
    return count;
  }

  function show(i) {
    if (here >= 0) cells[here].classList.remove("here");
    here = i;
    tip.hidden = i < 0 || !bits;
    if (tip.hidden) return;
    cells[i].classList.add("here");
    const count = draw(i);
    tip.querySelector("strong").textContent = `held by ${count} of ${total}`;
    tip.querySelector("span").textContent = `token ${starts[i].toLocaleString("en")}\u2003layers ↓ KV heads →`;
    const at = cells[i].getClientRects()[0] || cells[i].getBoundingClientRect(), size = tip.getBoundingClientRect();
    const below = at.bottom + 8 + size.height <= window.innerHeight;
    const x = Math.max(8, Math.min(at.left, window.innerWidth - size.width - 8));
    const y = below ? at.bottom + 8 : Math.max(8, at.top - 8 - size.height);
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
  }

  const under = (event) => index.get(event.target.closest("#text i")) ?? -1;
  box.addEventListener("pointermove", (event) => { const i = under(event); if (i !== here) show(i); });
  box.addEventListener("pointerleave", () => show(-1));
  box.addEventListener("click", (event) => show(under(event)));
  box.addEventListener("scroll", () => { if (document.activeElement !== box) show(-1); });
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") return show(-1);
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(cells.length - 1, here + step));
    if (cells.length) { cells[next].scrollIntoView({ block: "nearest" }); show(next); }
  });

  document.getElementById("pairs").addEventListener("change", (event) => {
    const pair = Number(event.target.value);
    show(-1);
    if (bits) cells.forEach((cell, i) => { cell.className = pair < 0 ? levels[i] : holds(pair, i) ? "l7" : ""; });
  });
})();

// Checks of what is on the page now, each a list of faults. Run by tests/page/test_access.py.
(() => {
  const visible = (node) => {
    const box = node.getBoundingClientRect();
    return node.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && box.width > 1 && box.height > 1;
  };

  const named = (node) => {
    const by = (node.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent || "").join("");
    const label = [...(node.labels || [])].map((l) => l.textContent).join("");
    const own = node.matches("input, select, textarea, [role=region], [role=log], svg") ? "" : node.textContent;
    return (node.getAttribute("aria-label") || by || label || own || "").trim();
  };

  const where = (node) => `${node.tagName.toLowerCase()}${node.id ? `#${node.id}` : ""}.${node.getAttribute("class") || ""} "${node.textContent.trim().slice(0, 40)}"`;

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const brush = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = color;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const behind = (node) => {
    const layers = [];
    for (let n = node; n; n = n.parentElement) {
      // A label on an arrow lies on its plate.
      const plate = n.matches?.("g.label") && n.querySelector("rect");
      const color = rgba(plate ? getComputedStyle(plate).fill : getComputedStyle(n).backgroundColor);
      layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, two) => {
    const [high, low] = [luminance(one), luminance(two)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };

  const texts = () => {
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const node = walk.currentNode.parentElement;
      if (walk.currentNode.data.trim() && !node.closest("script, style, .unseen, .skip, option") && visible(node)) found.push(node);
    }
    return [...found, ...[...document.querySelectorAll("input, select, textarea")].filter(visible)];
  };

  return {
    texts: texts().length,
    unnamed: [...document.querySelectorAll("a, button, input, select, textarea, [tabindex='0'], [role=group], [role=region], section")]
      .filter((node) => visible(node) && !named(node)).map(where),
    faint: texts().map((node) => {
      const style = getComputedStyle(node);
      const background = behind(node);
      const color = over(rgba(node instanceof SVGElement ? style.fill : style.color), background);
      return [contrast(color, background), node];
    }).filter(([ratio]) => ratio < 4.5).map(([ratio, node]) => `${ratio.toFixed(2)} ${where(node)}`),
    headings: [...document.querySelectorAll("h1, h2, h3, h4")].filter((node) => node.checkVisibility()).map((node) => Number(node.tagName[1])),
    ids: [...document.querySelectorAll("[id]")].map((node) => node.id).filter((id, place, all) => all.indexOf(id) !== place),
    small: [...document.querySelectorAll("button, select, input")].filter((node) => visible(node) && node.getBoundingClientRect().height < 24).map(where),
    landmarks: ["main", "header"].filter((tag) => document.querySelectorAll(tag).length !== 1),
    wide: document.documentElement.scrollWidth - innerWidth,
  };
})()

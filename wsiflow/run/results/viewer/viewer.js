/*
 * The viewer of slides, in reports and on its own page: a zoomable picture, the heatmap, detections and true outlines.
 *
 * The page holds an element #wsiflow-viewer and, as JSON in #wsiflow-index, the runs and the slides of each. What is
 * drawn of slide i of run r is JSON in #slide-r-i, or comes from r/slide/i.json where there is no such element.
 * wsiflow/run/results/shown.py says what these hold. Coordinates are level-0 pixels of the slide (l0), or pixels of the
 * screen (s).
 */
"use strict";
(() => {
  const HIT = "hit", FALSE_POSITIVE = "false positive", LESION = "lesion";
  const COLOUR = {hit: "#00a26b", miss: "#ff3b30", fp: "#ffb000", other: "#8a939c"};
  const MOST_LISTED = 200, MOST_PRINTED = 24, MOST_PRINTED_FINDINGS = 40;
  const PRINTED_PX = 700; // the long side of a printed picture, in which lines are as wide as on the screen
  const MAPS = {
    // The upper part of viridis. Its lower part, purple, is the colour of haematoxylin.
    "teal to yellow": [[38, 130, 142], [31, 158, 137], [74, 193, 109], [160, 218, 57], [253, 231, 37]],
    "cyan": [[0, 160, 210], [0, 160, 210]],
    "grey": [[30, 30, 30], [120, 120, 120]],
  };

  /** Make an element with properties, listeners (on...) and children. */
  function make(tag, given = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name in made && name !== "list") made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter(child => child !== null && child !== ""));
    return made;
  }

  const plural = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

  /** Return a length in micrometres as people say it. */
  const lengthText = um => (um >= 1000 ? `${+(um / 1000).toPrecision(3)} mm` : `${+um.toPrecision(3)} µm`);

  /** Return the colours of the 256 values of a heatmap picture, as 32-bit RGBA in the order of canvas memory. */
  function palette(look) {
    const stops = MAPS[look.map], colours = new Uint32Array(256);
    for (let value = 1; value < 256; value += 1) {
      const score = (value - 1) / 254;
      if (!look.heat || score < look.from) continue; // low scores are clear: no haze over glass
      const place = score * (stops.length - 1), k = Math.min(Math.floor(place), stops.length - 2);
      const [r, g, b] = stops[k].map((from, c) => Math.round(from + (stops[k + 1][c] - from) * (place - k)));
      const alpha = Math.round(255 * look.opacity * (0.4 + 0.6 * score));
      colours[value] = ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
    }
    return colours;
  }

  /** A heatmap: tiles of 8-bit values, coloured here, so that opacity, threshold and colours change at once. */
  class Heat {
    constructor(heat, address, redraw) {
      Object.assign(this, {heat, address, redraw, tiles: new Map(), colours: palette({map: "grey"}), version: 0});
    }

    paint(look) {
      this.colours = palette(look);
      this.version += 1;
    }

    /** Return a tile, or null while it is loading. */
    tile(level, row, col) {
      const key = `${level}/${row}_${col}`;
      if (!this.tiles.has(key)) {
        this.tiles.set(key, null);
        const image = new Image();
        image.src = this.heat.src || `${this.address}/${key}.png`;
        image.decode().then(() => {
          this.tiles.set(key, this.decoded(image));
          this.redraw();
        }, () => this.tiles.delete(key));
      }
      return this.tiles.get(key);
    }

    decoded(image) {
      const canvas = make("canvas", {width: image.naturalWidth, height: image.naturalHeight});
      const context = canvas.getContext("2d", {willReadFrequently: true});
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
      const values = new Uint8Array(canvas.width * canvas.height);
      for (let i = 0; i < values.length; i += 1) values[i] = pixels.data[4 * i];
      return {canvas, context, pixels, values, version: -1};
    }

    coloured(tile) {
      if (tile.version !== this.version) {
        const target = new Uint32Array(tile.pixels.data.buffer);
        for (let i = 0; i < target.length; i += 1) target[i] = this.colours[tile.values[i]];
        tile.context.putImageData(tile.pixels, 0, 0);
        tile.version = this.version;
      }
      return tile.canvas;
    }

    /** Return the finest level whose cells are no smaller than a pixel of the screen, else the coarsest. */
    level(scale) {
      const {levels, cell} = this.heat;
      const fits = levels.findIndex(level => cell * level.scale * scale >= 0.9);
      return fits < 0 ? levels.length - 1 : fits;
    }

    draw(context, view) {
      const {levels, tile: side} = this.heat, number = this.level(view.scale), level = levels[number];
      const last = levels.length - 1, cellPx = this.heat.cell * level.scale * view.scale;
      const left = view.x + this.heat.x * view.scale, top = view.y + this.heat.y * view.scale;
      context.imageSmoothingEnabled = false;
      for (let row = 0; row * side < level.rows; row += 1) {
        for (let col = 0; col * side < level.cols; col += 1) {
          const rows = Math.min(side, level.rows - row * side), cols = Math.min(side, level.cols - col * side);
          const x0 = left + col * side * cellPx, y0 = top + row * side * cellPx;
          const x1 = x0 + cols * cellPx, y1 = y0 + rows * cellPx;
          if (x1 < 0 || y1 < 0 || x0 > view.width || y0 > view.height) continue;
          const tile = this.tile(number, row, col), coarse = tile || last === number ? null : this.tile(last, 0, 0);
          if (tile) context.drawImage(this.coloured(tile), x0, y0, x1 - x0, y1 - y0);
          else if (coarse) {
            const step = levels[last].scale / level.scale;
            context.drawImage(this.coloured(coarse), (col * side) / step, (row * side) / step, cols / step, rows / step,
              x0, y0, x1 - x0, y1 - y0);
          }
        }
      }
    }

    /** Return the score at a point of the slide, or null where there is none, or none is loaded. */
    score(x, y, scale) {
      const number = this.level(scale), {cell, levels, tile: side} = this.heat;
      const [col, row] = [(x - this.heat.x), (y - this.heat.y)].map(at => Math.floor(at / (cell * levels[number].scale)));
      const tile = this.tiles.get(`${number}/${Math.floor(row / side)}_${Math.floor(col / side)}`);
      if (!tile || row < 0 || col < 0 || row >= levels[number].rows || col >= levels[number].cols) return null;
      const value = tile.values[(row % side) * tile.canvas.width + (col % side)];
      return value ? (value - 1) / 254 : null;
    }
  }

  /** Return the findings of a slide by what became of them, at a least confidence of detections. */
  function findings(slide, from) {
    const groups = {missed: [], fp: [], hit: [], unknown: [], other: []};
    for (const region of slide.regions) {
      const found = region.best !== null && region.best >= from;
      if (region.kind !== LESION) groups.other.push({region, text: region.kind === "ignored" ? "Ignored regions" : "Isolated tumour cells",
        about: found ? `best ${region.best.toFixed(3)}` : ""});
      else if (found) {
        groups.hit.push({region, text: `Lesion ${region.number}`, about: `found with ${region.best.toFixed(3)}`});
      } else {
        const best = region.best === null ? region.reason || "no detection in it" : `best ${region.best.toFixed(3)}`;
        groups.missed.push({region, text: `Lesion ${region.number}`, about: best});
      }
    }
    slide.detections.forEach(([prob, x, y, kind, inside], index) => {
      if (prob < from || (kind === HIT && inside)) return; // its lesion is listed
      const group = kind === FALSE_POSITIVE ? groups.fp : kind ? groups.other : groups.unknown;
      const text = kind === FALSE_POSITIVE ? "False positive" : kind ? "Detection, ignored" : "Detection";
      group.push({index, x, y, prob, text, about: `confidence ${prob.toFixed(3)}`});
    });
    for (const group of [groups.fp, groups.unknown]) group.sort((a, b) => b.prob - a.prob);
    return groups;
  }

  /** One picture: a slide of one run with its layers. */
  class Pane {
    constructor(app, run) {
      Object.assign(this, {app, run, slide: null, heat: null, chosen: null, span: 1});
      this.title = make("h4");
      this.stage = make("div", {className: "wsv-stage", tabIndex: 0, role: "application"});
      this.note = make("p", {className: "wsv-note", hidden: true});
      this.box = make("div", {className: "wsv-pane"}, this.title, this.stage, this.note);
    }

    start() {
      this.osd = OpenSeadragon({
        element: this.stage, drawer: "canvas", showNavigationControl: false, showNavigator: true,
        navigatorPosition: "TOP_RIGHT", navigatorSizeRatio: 0.16, navigatorAutoFade: false,
        navigatorBackground: "#fff", navigatorBorderColor: "#8a939c", navigatorDisplayRegionColor: "#2a7fd4",
        animationTime: 0.4, springStiffness: 12,
        visibilityRatio: 0.3, minZoomImageRatio: 0.6, maxZoomPixelRatio: 8, imageLoaderLimit: 6, timeout: 120000,
        gestureSettingsMouse: {clickToZoom: false, dblClickToZoom: true}, keyboardNavEnabled: false,
        crossOriginPolicy: false, tabIndex: -1, placeholderFillStyle: "#ffffff",
      });
      this.canvas = make("canvas", {style: "position:absolute;inset:0;width:100%;height:100%;pointer-events:none"});
      this.osd.canvas.append(this.canvas);
      this.osd.innerTracker.keyHandler = this.osd.innerTracker.keyDownHandler = null; // the page handles keys
      for (const event of ["open", "update-viewport", "resize"]) this.osd.addHandler(event, () => this.draw());
      this.osd.addHandler("viewport-change", () => this.app.follow(this));
      this.osd.addHandler("open-failed", () => this.say("the picture of this slide cannot be shown"));
      this.osd.addHandler("tile-load-failed", event => {
        if (!/abort/i.test(event.message || "")) this.say("a part of the picture cannot be read");
      });
      this.osd.addHandler("canvas-click", event => event.quick && this.pick(event.position));
      this.stage.addEventListener("mousemove", event => this.point(event));
    }

    say(text) {
      this.note.textContent = text;
      this.note.hidden = !text;
    }

    show(slide, number) {
      this.slide = slide;
      this.chosen = null;
      const score = slide.score === "" ? "" : `, score ${slide.score}`;
      this.title.replaceChildren(slide.name, make("span", {}, ` ${slide.truth || "no truth"}${score}`));
      if (this.app.runs.length > 1) this.title.append(make("span", {}, ` · ${this.app.runs[this.run].name}`));
      this.stage.setAttribute("aria-label", `${slide.name}: picture with heatmap, detections and outlines`);
      const [reason] = slide.notes;
      this.say(slide.remark || (slide.width ? "" : `there is no picture of this slide${reason ? `: ${reason}` : ""}`));
      this.heat = slide.heat ? new Heat(slide.heat, `${this.run}/heat/${number}`, () => this.draw()) : null;
      this.paint();
      const {picture, tiles} = slide;
      if (picture) {
        this.span = picture.downsample * picture.width;
        this.osd.open({type: "image", url: picture.src});
      } else if (tiles) {
        this.span = slide.width;
        const address = (level, x, y) => `${this.run}/tile/${number}/${level}/${x}_${y}.jpg`;
        this.osd.open({width: slide.width, height: slide.height, tileSize: tiles.size, minLevel: 0,
          maxLevel: tiles.levels - 1, getTileUrl: address});
      } else this.osd.close();
    }

    paint() {
      if (this.heat) this.heat.paint(this.app.look);
    }

    /** Return where the slide lies on the screen. */
    view() {
      const port = this.osd.viewport, size = port.getContainerSize();
      const corner = port.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
      const scale = (port.getZoom(true) * size.x) / this.span;
      return {x: corner.x, y: corner.y, scale, width: size.x, height: size.y};
    }

    draw() {
      if (!this.slide || !this.osd.viewport) return;
      const view = this.view(), ratio = window.devicePixelRatio || 1, context = this.canvas.getContext("2d");
      this.canvas.width = Math.round(view.width * ratio);
      this.canvas.height = Math.round(view.height * ratio);
      if (!this.slide.width || !this.osd.isOpen()) return;
      context.scale(ratio, ratio);
      if (this.heat && this.app.look.heat) this.heat.draw(context, view);
      drawFindings(context, view, this.slide, this.app.look);
      this.ring(context, view);
      drawScaleBar(context, view, this.slide.um_px);
    }

    ring(context, view) {
      if (!this.chosen) return;
      const {x, y, width, height} = boxOf(this.chosen, 0);
      context.beginPath();
      context.arc(view.x + (x + width / 2) * view.scale, view.y + (y + height / 2) * view.scale,
        Math.max(16, (Math.hypot(width, height) / 2) * view.scale + 6), 0, 2 * Math.PI);
      context.setLineDash([2, 4]);
      stroke(context, "#2a7fd4", 2);
      context.setLineDash([]);
    }

    point(event) {
      if (!this.slide || !this.slide.width || !this.osd.isOpen()) return;
      const place = this.stage.getBoundingClientRect(), view = this.view();
      const x = (event.clientX - place.left - view.x) / view.scale, y = (event.clientY - place.top - view.y) / view.scale;
      const score = this.heat ? this.heat.score(x, y, view.scale) : null;
      const told = score === null ? "" : `, score ${score.toFixed(2)}`;
      this.app.place.textContent = `${Math.round(x)}, ${Math.round(y)} px${told}`;
    }

    /** Choose the detection or region at a point of the screen. */
    pick(at) {
      const view = this.view(), least = this.app.look.least;
      const x = (at.x - view.x) / view.scale, y = (at.y - view.y) / view.scale;
      const groups = findings(this.slide, least);
      const all = Object.values(groups).flat();
      const distance = item => (item.region ? Infinity : Math.hypot(item.x - x, item.y - y) * view.scale);
      const near = all.reduce((best, item) => (distance(item) < distance(best) ? item : best), {region: true});
      const inside = all.find(({region}) => region && region.box.length && x >= region.box[0] && y >= region.box[1] &&
        x <= region.box[2] && y <= region.box[3]);
      const found = distance(near) < 14 ? near : inside;
      if (found) this.app.choose(this, found, false);
    }

    goTo(item) {
      const tight = boxOf(item, 0), side = Math.max(tight.width, tight.height);
      const {x, y, width, height} = boxOf(item, Math.max(0.15 * side, 150 / this.slide.um_px));
      const [left, top, across, down] = [x, y, width, height].map(length => length / this.span);
      const home = this.osd.viewport.getHomeBounds();
      if (across > home.width && down > home.height) this.osd.viewport.goHome();
      else this.osd.viewport.fitBounds(new OpenSeadragon.Rect(left, top, across, down));
    }
  }

  /** Draw the true outlines and the detections of a slide that the look asks for. */
  function drawFindings(context, view, slide, look) {
    if (look.truth) slide.regions.forEach(region => drawOutline(context, view, region, look.least));
    if (look.truth) slide.regions.forEach(region => drawNumber(context, view, region));
    if (look.detections) drawDetections(context, view, slide.detections, look.least);
  }

  function drawOutline(context, view, region, least) {
    const found = region.best !== null && region.best >= least;
    const kind = region.kind !== LESION ? "other" : found ? "hit" : "miss";
    context.beginPath();
    for (const ring of region.rings) {
      context.moveTo(view.x + ring[0] * view.scale, view.y + ring[1] * view.scale);
      for (let i = 2; i < ring.length; i += 2) {
        context.lineTo(view.x + ring[i] * view.scale, view.y + ring[i + 1] * view.scale);
      }
      context.closePath();
    }
    context.setLineDash(kind === "miss" ? [9, 5] : kind === "other" ? [3, 4] : []);
    stroke(context, COLOUR[kind], 2.5);
    context.setLineDash([]);
  }

  /** Write the number of a region at its corner, or where the edge of the picture leaves room for it. */
  function drawNumber(context, view, {number, box}) {
    if (!number || !box.length || (box[2] - box[0]) * view.scale <= 12) return;
    const [left, top, right, bottom] = box.map((side, i) => (i % 2 ? view.y : view.x) + side * view.scale);
    if (right < 0 || bottom < 0 || left > view.width || top > view.height) return;
    context.font = "600 13px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    const x = Math.max(3, Math.min(left, view.width - context.measureText(number).width - 3)), y = Math.max(14, top - 5);
    context.lineWidth = 3;
    context.strokeStyle = "rgba(255,255,255,.9)";
    context.strokeText(number, x, y);
    context.fillStyle = "#1f2328";
    context.fillText(number, x, y);
  }

  function drawDetections(context, view, detections, least) {
    for (const [prob, x, y, kind] of detections) {
      if (prob < least) continue;
      const sx = view.x + x * view.scale, sy = view.y + y * view.scale;
      if (sx < -20 || sy < -20 || sx > view.width + 20 || sy > view.height + 20) continue;
      const colour = kind === HIT ? "hit" : kind === FALSE_POSITIVE ? "fp" : "other";
      context.beginPath();
      if (kind === FALSE_POSITIVE) { // a shape of its own, for those who do not tell the colours apart
        context.moveTo(sx, sy - 9);
        context.lineTo(sx + 8.5, sy + 6);
        context.lineTo(sx - 8.5, sy + 6);
        context.closePath();
      } else context.arc(sx, sy, 7, 0, 2 * Math.PI);
      stroke(context, COLOUR[colour], 2.5);
    }
  }

  function drawScaleBar(context, view, umPx) {
    const umPerPx = umPx / view.scale, widest = Math.min(180, view.width / 3) * umPerPx;
    const power = 10 ** Math.floor(Math.log10(widest)), um = [5, 2, 1].find(n => n * power <= widest) * power;
    const px = um / umPerPx, left = 12, bottom = view.height - 12, text = lengthText(um);
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    context.fillStyle = "rgba(255,255,255,.85)";
    context.fillRect(left - 6, bottom - 26, Math.max(px, context.measureText(text).width) + 12, 34);
    context.fillStyle = "#1f2328";
    context.fillRect(left, bottom - 4, px, 4);
    context.fillText(text, left, bottom - 10);
  }

  /** Stroke a path so that it is seen on stained tissue, on glass and on every colour of the map. */
  function stroke(context, colour, width) {
    for (const [more, style] of [[3.5, "rgba(255,255,255,.8)"], [1.6, "rgba(20,24,28,.75)"], [0, colour]]) {
      context.lineWidth = width + more;
      context.strokeStyle = style;
      context.stroke();
    }
  }

  /** Return the box of a finding with a margin around it, in level-0 pixels. */
  function boxOf(item, margin) {
    const [left, top, right, bottom] = item.region ? item.region.box : [item.x, item.y, item.x, item.y];
    return {x: left - margin, y: top - margin, width: right - left + 2 * margin, height: bottom - top + 2 * margin};
  }

  /** A report on paper: a sheet for each of the first slides of the list, with its picture and its findings. */
  class Printed {
    constructor(app) {
      Object.assign(this, {app, images: new Map(), box: make("div", {className: "wsv-sheets"})});
      app.root.after(this.box);
      window.addEventListener("beforeprint", () => this.fill());
      window.addEventListener("afterprint", () => this.box.replaceChildren());
    }

    /** Load the pictures of the slides that would be printed now: while the browser prints, nothing can be loaded. */
    prepare() {
      const wanted = new Set(this.app.order.slice(0, MOST_PRINTED));
      for (const i of this.images.keys()) if (!wanted.has(i)) this.images.delete(i);
      const next = () => {
        const i = [...wanted].find(each => !this.images.has(each));
        if (i === undefined) return;
        const {picture, heat} = inlined(0, i) || {};
        const load = from => (from ? make("img", {src: from.src}) : null);
        this.images.set(i, {picture: load(picture), heat: load(heat)});
        this.waits = setTimeout(next);
      };
      clearTimeout(this.waits);
      this.waits = setTimeout(next, 500); // after the slide that is looked at
    }

    fill() {
      const {order} = this.app, left = order.length - MOST_PRINTED;
      this.box.replaceChildren(...order.slice(0, MOST_PRINTED).map(i => this.sheet(inlined(0, i), this.images.get(i) || {})));
      if (left > 0) {
        this.box.append(make("p", {}, `${plural(left, "more slide")} of the list are not printed. Find or sort slides ` +
          "in the list to print others."));
      }
    }

    sheet(slide, images) {
      const score = slide.score === "" ? "" : `, score ${slide.score}`;
      const title = make("h3", {}, slide.name, make("span", {}, ` ${slide.truth || "no truth"}${score}`));
      const groups = findings(slide, this.app.look.least);
      const lists = [["Missed lesions, red dashes", groups.missed], ["False positives, triangles", groups.fp],
        ["Lesions found, green", groups.hit], ["Detections, circles", groups.unknown], ["Not counted, grey", groups.other]]
        .filter(([, items]) => items.length).map(([text, items]) => make("div", {}, make("h4", {}, `${text} (${items.length})`),
          make("p", {}, items.slice(0, MOST_PRINTED_FINDINGS).map(item => `${item.text}: ${item.about}`).join("; ") +
            (items.length > MOST_PRINTED_FINDINGS ? `; and ${items.length - MOST_PRINTED_FINDINGS} more` : ""))));
      const least = this.app.look.least ? [`Detections from ${this.app.look.least.toFixed(2)}.`] : [];
      const none = lists.length ? [] : ["Nothing was found and nothing is annotated."];
      return make("section", {className: "wsv-sheet"}, title, this.drawn(slide, images),
        ...[...slide.notes, ...least, ...none].map(text => make("p", {}, text)), ...lists);
    }

    /** Return a slide with all its layers as one picture. */
    drawn(slide, {picture, heat}) {
      if (!slide.picture || !picture || !picture.complete) return make("p", {}, "There is no picture of this slide.");
      const side = Math.max(slide.width, slide.height), scale = PRINTED_PX / side, {look} = this.app;
      const view = {x: 0, y: 0, scale, width: slide.width * scale, height: slide.height * scale};
      const canvas = make("canvas", {width: 2 * Math.round(view.width), height: 2 * Math.round(view.height)});
      const context = canvas.getContext("2d", {willReadFrequently: true});
      context.scale(2, 2);
      context.drawImage(picture, 0, 0, view.width, view.height);
      if (look.heat && heat && heat.complete) {
        const layer = new Heat(slide.heat, "", () => {});
        layer.paint(look);
        layer.tiles.set("0/0_0", layer.decoded(heat));
        layer.draw(context, view);
      }
      drawFindings(context, view, slide, look);
      drawScaleBar(context, view, slide.um_px);
      return canvas;
    }
  }

  /** The whole: the list of slides, a picture for each run, the layers and the findings. */
  class App {
    constructor(root, index) {
      Object.assign(this, {root, runs: index.runs, slide: -1, order: [], buttons: new Map(), items: []});
      this.look = {heat: true, truth: true, detections: true, opacity: 0.6, from: 0.1, least: 0, map: "teal to yellow"};
      this.slides = this.joined();
      this.seen = new IntersectionObserver(changes => this.showSmall(changes));
      this.panes = this.runs.map((_, run) => new Pane(this, run));
      this.build(index.full);
      this.panes.forEach(pane => pane.start());
      document.addEventListener("keydown", event => this.key(event));
      window.addEventListener("hashchange", () => this.openLinked());
      this.printed = index.full ? null : new Printed(this);
      this.list();
      if (!this.openLinked() && this.order.length) this.open(this.order[0]);
    }

    /** Return the slides of all runs, each with its number in each run (-1 where it has none). */
    joined() {
      const slides = new Map();
      this.runs.forEach((run, r) => run.slides.forEach((slide, number) => {
        if (!slides.has(slide.id)) slides.set(slide.id, {...slide, numbers: this.runs.map(() => -1), problems: []});
        const own = slides.get(slide.id);
        own.numbers[r] = number;
        own.problems.push(this.runs.length > 1 && slide.problem ? `${run.name}: ${slide.problem}` : slide.problem);
      }));
      return [...slides.values()];
    }

    build(full) {
      const button = (text, about, run) => make("button", {type: "button", title: about, onclick: run}, text);
      this.search = make("input", {type: "search", placeholder: "Find a slide", ariaLabel: "Find a slide",
        oninput: () => this.list(),
        onkeydown: event => event.key === "Enter" && this.order.length && this.open(this.order[0])});
      this.sorting = make("select", {ariaLabel: "Order of the slides", onchange: () => this.list()},
        ...["what went wrong", "name", "score, high first"].map(text => make("option", {}, text)));
      this.names = make("ol", {ariaLabel: "Slides"});
      this.place = make("output");
      this.facts = make("div", {className: "wsv-facts"});
      this.found = make("div", {className: "wsv-items", ariaLabel: "Findings"});
      const bar = make("div", {className: "wsv-bar"},
        button("Whole slide", "key 0", () => this.zoom(0)), button("+", "zoom in, key +", () => this.zoom(1.6)),
        button("−", "zoom out, key -", () => this.zoom(1 / 1.6)),
        button("Previous finding", "key p", () => this.step(-1)), button("Next finding", "key n", () => this.step(1)),
        this.place);
      const keys = make("p", {className: "wsv-keys"});
      keys.innerHTML = "<kbd>j</kbd> <kbd>k</kbd> slides, <kbd>n</kbd> <kbd>p</kbd> findings, arrows move, <kbd>+</kbd> " +
        "<kbd>-</kbd> <kbd>0</kbd> zoom, <kbd>m</kbd> map, <kbd>t</kbd> truth, <kbd>d</kbd> detections";
      this.root.className = full ? "wsv full" : "wsv";
      this.root.replaceChildren(
        make("div", {className: "wsv-slides"}, make("div", {className: "wsv-find"}, this.search, this.sorting), this.names),
        make("div", {}, make("div", {className: "wsv-panes"}, ...this.panes.map(pane => pane.box)), bar),
        make("div", {}, this.looks(), this.facts, this.found, keys));
    }

    looks() {
      const slider = (text, name) => {
        const shown = make("output", {}, this.look[name].toFixed(2));
        const input = make("input", {type: "range", min: 0, max: 1, step: 0.01, value: this.look[name], ariaLabel: text,
          name, oninput: () => {
            this.look[name] = Number(input.value);
            shown.textContent = this.look[name].toFixed(2);
            this.relook(name === "least");
          }});
        return [make("label", {}, text), input, shown];
      };
      const check = (text, name) => {
        const input = make("input", {type: "checkbox", checked: true, name, onchange: () => {
          this.look[name] = input.checked;
          this.relook(false);
        }});
        return make("label", {}, input, ` ${text}`);
      };
      const maps = make("select", {ariaLabel: "Colours of the map", name: "map", onchange: () => {
        this.look.map = maps.value;
        this.relook(false);
      }}, ...Object.keys(MAPS).map(name => make("option", {}, name)));
      this.scale = make("div", {className: "wsv-scale", title: "scores from 0 to 1"});
      return make("div", {},
        make("div", {className: "wsv-shown"}, check("map", "heat"), check("truth", "truth"),
          check("detections", "detections")),
        make("div", {className: "wsv-looks"}, ...slider("Opacity", "opacity"), ...slider("Map from", "from"),
          ...slider("Detections from", "least"), make("label", {}, "Colours"), maps, ""),
        make("div", {className: "wsv-scales"}, "0", this.scale, "1"));
    }

    relook(listed) {
      this.panes.forEach(pane => {
        pane.paint();
        pane.draw();
      });
      const stops = MAPS[this.look.map].map(rgb => `rgb(${rgb})`).join(",");
      this.scale.style.background = `linear-gradient(90deg,#fff ${100 * this.look.from}%,transparent 0),` +
        `linear-gradient(90deg,${stops})`;
      if (listed) this.listFindings();
    }

    // --- slides

    list() {
      const words = this.search.value.toLowerCase(), by = this.sorting.selectedIndex;
      const order = this.slides.map((_, i) => i).filter(i =>
        `${this.slides[i].name} ${this.slides[i].id} ${this.slides[i].truth}`.toLowerCase().includes(words));
      const value = i => (this.slides[i].score === "" ? -1 : Number(this.slides[i].score));
      if (by === 1) order.sort((a, b) => this.slides[a].name.localeCompare(this.slides[b].name, "en", {numeric: true}));
      if (by === 2) order.sort((a, b) => value(b) - value(a));
      this.order = order;
      this.seen.disconnect();
      this.buttons = new Map(order.map(i => [i, this.slideButton(i)]));
      this.names.replaceChildren(...order.map(i => make("li", {}, this.buttons.get(i))));
      this.markSlide();
      if (this.printed) this.printed.prepare();
    }

    slideButton(i) {
      const slide = this.slides[i], problems = slide.problems.filter(Boolean).join("; ");
      const score = slide.score === "" ? "" : `, score ${slide.score}`;
      const small = make("img", {alt: "", className: "wsv-small"});
      small.dataset.slide = i;
      this.seen.observe(small);
      return make("button", {type: "button", onclick: () => this.open(i)}, small, make("span", {}, slide.name,
        make("small", {}, `${slide.truth || "no truth"}${score}`), problems ? make("small", {}, problems) : ""));
    }

    /** Load the small pictures of slides that come into sight in the list. */
    showSmall(changes) {
      for (const {target, isIntersecting} of changes) {
        if (!isIntersecting) continue;
        this.seen.unobserve(target);
        const {numbers} = this.slides[target.dataset.slide], run = numbers.findIndex(number => number >= 0);
        const inline = inlined(run, numbers[run]);
        if (!inline) target.src = `${run}/small/${numbers[run]}.jpg`;
        else if (inline.picture) target.src = inline.picture.src;
      }
    }

    markSlide() {
      const [first] = this.order, chosen = this.buttons.has(this.slide) ? this.slide : first;
      this.buttons.forEach((button, i) => {
        button.setAttribute("aria-current", String(i === this.slide));
        button.tabIndex = i === chosen ? 0 : -1; // one stop of the tab key for the whole list
      });
      const button = this.buttons.get(this.slide);
      if (button) this.names.scrollTop = button.offsetTop - this.names.offsetTop - this.names.clientHeight / 3;
    }

    openLinked() {
      const id = new URLSearchParams(location.hash.slice(1)).get("slide");
      const found = id === null ? -1 : this.slides.findIndex(slide => slide.id === id);
      if (found < 0) return false;
      this.open(found);
      this.root.scrollIntoView({block: "nearest"});
      return true;
    }

    async open(i) {
      if (this.slide === i) return;
      this.slide = i;
      this.markSlide();
      try {
        history.replaceState(null, "", `#slide=${encodeURIComponent(this.slides[i].id)}`);
      } catch { /* a page within another one, as MLflow shows it, has no address of its own */ }
      await Promise.all(this.panes.map(async pane => {
        const number = this.slides[i].numbers[pane.run];
        const slide = number < 0 ? null : await this.load(pane.run, number);
        if (this.slide === i) pane.show(slide || absent(this.slides[i]), number);
      }));
      if (this.slide !== i) return; // another one was opened meanwhile
      this.relook(true);
      this.root.dataset.slide = this.slides[i].id;
    }

    async load(run, number) {
      const inline = inlined(run, number);
      if (inline) return inline;
      const listed = this.runs[run].slides[number];
      try {
        const answer = await fetch(`${run}/slide/${number}.json`);
        return answer.ok ? await answer.json() : {...absent(listed), remark: await answer.text()};
      } catch {
        return {...absent(listed), remark: "the viewer has ended: start it again"};
      }
    }

    // --- findings

    listFindings() {
      this.items = [];
      const blocks = [], several = this.panes.length > 1;
      if (several) blocks.push(...this.differences());
      for (const pane of this.panes) {
        const groups = findings(pane.slide, this.look.least), run = several ? `${this.runs[pane.run].name}: ` : "";
        blocks.push(...this.group(pane, `${run}Missed lesions`, "miss", groups.missed),
          ...this.group(pane, `${run}False positives`, "fp", groups.fp),
          ...this.group(pane, `${run}Lesions found`, "hit", groups.hit),
          ...this.group(pane, `${run}Detections`, "other", groups.unknown),
          ...this.group(pane, `${run}Not counted`, "other", groups.other));
      }
      this.found.replaceChildren(...blocks);
      const told = this.panes.flatMap(pane => [...pane.slide.notes,
        ...(pane.slide.unlisted ? [`${plural(pane.slide.unlisted, "more detection")} in detections/${pane.slide.id}.csv`] : [])]);
      this.facts.replaceChildren(...[...new Set(told)].map(text => make("p", {}, text)));
    }

    /** Return the lesions that one run finds and the other misses. */
    differences() {
      const [first, second] = this.panes.map(pane => findings(pane.slide, this.look.least));
      const numbers = groups => new Set(groups.map(item => item.region.number));
      const own = [[first, second, 0], [second, first, 1]].flatMap(([ours, theirs, run]) => {
        const missed = numbers(theirs.missed), alone = ours.hit.filter(item => missed.has(item.region.number));
        return this.group(this.panes[run], `Found by ${this.runs[run].name} alone`, "hit", alone);
      });
      return own.length ? own : [make("h3", {}, "Both find the same lesions")];
    }

    group(pane, title, kind, items) {
      if (!items.length) return [];
      const listed = items.slice(0, MOST_LISTED);
      const rows = listed.map(item => {
        const entry = {pane, item, kind};
        entry.button = make("button", {type: "button", className: kind, onclick: () => this.choose(pane, item, true)},
          item.text, item.about ? make("small", {}, item.about) : "");
        this.items.push(entry);
        return make("li", {}, entry.button);
      });
      const more = items.length - listed.length;
      if (more) rows.push(make("li", {}, make("small", {}, `and ${more} more`)));
      return [make("h3", {}, `${title} (${items.length})`), make("ol", {}, ...rows)];
    }

    choose(pane, item, moves) {
      const same = other => (item.region ? other.region && other.region.number === item.region.number &&
        other.region.kind === item.region.kind : other.index === item.index);
      this.panes.forEach(each => {
        each.chosen = each === pane ? item : null;
      });
      this.items.forEach(entry => {
        const is = entry.pane === pane && same(entry.item);
        entry.button.setAttribute("aria-current", String(is));
        if (is) entry.button.scrollIntoView({block: "nearest"});
      });
      if (moves && (!item.region || item.region.box.length)) pane.goTo(item);
      this.panes.forEach(each => each.draw());
    }

    step(by) {
      if (!this.items.length) return;
      const now = this.items.findIndex(entry => entry.button.getAttribute("aria-current") === "true");
      const next = now < 0 ? (by > 0 ? 0 : this.items.length - 1) : (now + by + this.items.length) % this.items.length;
      this.choose(this.items[next].pane, this.items[next].item, true);
    }

    // --- moving

    zoom(factor) {
      for (const {osd} of this.panes.slice(0, 1)) {
        if (!osd.isOpen()) continue;
        if (factor) osd.viewport.zoomBy(factor).applyConstraints();
        else osd.viewport.goHome();
      }
    }

    pan(x, y) {
      const {osd} = this.panes[0], bounds = osd.viewport.getBounds();
      osd.viewport.panBy(new OpenSeadragon.Point((x * bounds.width) / 4, (y * bounds.height) / 4)).applyConstraints();
    }

    /** Show the same part of the slide in the other pictures, unless it is what another one has just shown here. */
    follow(pane) {
      if (this.panes.length < 2 || !pane.osd.isOpen()) return;
      const {x, y, width, height} = pane.osd.viewport.getBounds(true);
      if (pane.echo === `${x} ${y} ${width} ${height}`) return;
      for (const other of this.panes) {
        if (other === pane || !other.osd.isOpen()) continue;
        const [left, top, across, down] = [x, y, width, height].map(side => (side * pane.span) / other.span);
        other.osd.viewport.fitBounds(new OpenSeadragon.Rect(left, top, across, down), true);
        const shown = other.osd.viewport.getBounds(true);
        other.echo = `${shown.x} ${shown.y} ${shown.width} ${shown.height}`;
      }
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]), select")) return;
      if (!this.root.classList.contains("full") && !this.root.contains(document.activeElement)) return;
      const toggle = name => this.root.querySelector(`input[name=${name}]`).click();
      const isListed = this.names.contains(document.activeElement);
      const slide = by => {
        const next = this.order[this.order.indexOf(this.slide) + by];
        if (next === undefined) return;
        this.open(next);
        if (isListed) this.buttons.get(next).focus({preventScroll: true});
      };
      const actions = {
        j: () => slide(1), k: () => slide(-1), n: () => this.step(1), p: () => this.step(-1), 0: () => this.zoom(0),
        "+": () => this.zoom(1.6), "=": () => this.zoom(1.6), "-": () => this.zoom(1 / 1.6), m: () => toggle("heat"),
        t: () => toggle("truth"), d: () => toggle("detections"), ArrowLeft: () => this.pan(-1, 0),
        ArrowRight: () => this.pan(1, 0), ArrowUp: () => (isListed ? slide(-1) : this.pan(0, -1)),
        ArrowDown: () => (isListed ? slide(1) : this.pan(0, 1)),
      };
      const action = actions[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    }
  }

  /** Return what the page itself holds of a slide; null where it comes from a server. */
  function inlined(run, number) {
    const element = document.getElementById(`slide-${run}-${number}`);
    return element && JSON.parse(element.textContent);
  }

  /** Return what stands for a slide of which nothing is known. */
  function absent(slide) {
    return {...slide, width: 0, height: 0, um_px: 1, notes: [], detections: [], regions: [], remark: "not in this run"};
  }

  const root = document.getElementById("wsiflow-viewer");
  window.wsiflow = new App(root, JSON.parse(document.getElementById("wsiflow-index").textContent));
})();

// Runs everything that the index lists, and shows what the program that serves this page says of the results.

import { get, missing, open, replay } from "./replay.js";

const json = async (path) => (await get(path)).json();

// The answer; null from a server that only has the files.
async function post(path, body) {
  const response = await fetch(path, { method: "POST", body });
  if ([404, 405, 501].includes(response.status)) return null;
  if (!response.ok) throw new Error(`${path}: ${await response.text()}`);
  return response.json();
}

const byId = (id) => document.getElementById(id);
const element = (name, text = "", className = "") =>
  Object.assign(document.createElement(name), { textContent: text, className });
const row = (...cells) => {
  const tr = element("tr");
  tr.append(...cells.map((cell) => (cell instanceof Node ? cell : element("td", cell))));
  return tr;
};

// Tables and counts of a device and a type of embeddings.
const groups = new Map();
function group({ device, dtype }) {
  const key = `${device}, ${dtype}`;
  if (!groups.has(key)) {
    const [runs, passed, failed] = ["0", "0", "0"].map((zero) => element("td", zero, "number"));
    byId("summary").append(row(device, dtype, runs, passed, failed));
    const details = element("details");
    details.open = groups.size === 0;
    const numbers = ["loss", "expected loss", "largest gradient error", "tolerance"];
    const table = element("table");
    table.append(
      row(element("th", "case"), ...numbers.map((text) => element("th", text, "number")), element("th")),
    );
    details.append(element("summary", `${dtype} embeddings, ${device}`), table);
    byId("details").append(details);
    groups.set(key, { runs, passed, failed, table, details });
  }
  return groups.get(key);
}

function show(verdict) {
  const { runs, passed, failed, table, details } = group(verdict);
  const count = (cell, look) => {
    cell.textContent = Number(cell.textContent) + 1;
    cell.className = `number ${look}`;
  };
  count(runs, "");
  if (verdict.passed === true) count(passed, "pass");
  if (verdict.passed === false) count(failed, "fail");
  if (verdict.passed === false) details.open = true;
  const [word, look] =
    verdict.passed === null ? ["not judged", "quiet"] : verdict.passed ? ["PASS", "pass"] : ["FAIL", "fail"];
  const name = element("td", verdict.case);
  if (verdict.reason) name.append(element("div", verdict.reason, "reason"));
  const numbers = [verdict.loss, verdict.expected_loss, verdict.gradient_error, verdict.tolerance];
  table.append(row(name, ...numbers.map((text) => element("td", text, "number")), element("td", word, look)));
}

function skip(device, lacks) {
  const cell = element("td", `skipped: this browser or its adapter lacks ${lacks}`, "quiet");
  cell.colSpan = 4;
  byId("summary").append(row(device, cell));
}

// Without a judge the loss, the first f32 of the results, stands beside the expected one.
const unjudged = (run, results) => ({
  ...run,
  loss: results ? new DataView(results).getFloat32(256, true).toPrecision(8) : "",
  expected_loss: run.expected_loss.toPrecision(8),
  gradient_error: "",
  tolerance: "",
  passed: null,
});

async function requestAdapter() {
  if (!navigator.gpu) throw new Error("this browser has no WebGPU, or only for pages from https or localhost");
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new Error("this browser has WebGPU, but no adapter for it");
  return adapter;
}

function nameOf({ info }) {
  const parts = [info.vendor, info.architecture, info.device, info.description].filter((part) => part);
  const browser = navigator.userAgent.match(/(Firefox|Edg|\w*Chrome|Version)\/[\d.]+/)?.[0] ?? navigator.userAgent;
  return `${parts.join(" ") || "an adapter without a name"}, ${browser.replace("/", " ")}`;
}

async function runAll() {
  const name = nameOf(await requestAdapter());
  byId("adapter").textContent = name;
  await post("started", name);
  const { devices, runs } = await json("index.json");
  for (const wanted of devices) {
    const adapter = await requestAdapter(); // a device uses it up
    const lacks = missing(adapter, wanted);
    if (lacks) {
      skip(wanted.name, lacks);
      await post("skipped", `${wanted.name}\n${lacks}`);
      continue;
    }
    const gpu = await open(adapter, wanted);
    for (const [k, run] of runs.entries()) {
      if (run.device !== wanted.name) continue;
      try {
        const contents = await (await get(run.contents)).arrayBuffer();
        const results = await replay(gpu, await json(run.plan), contents);
        show((await post(`runs/${k}`, results)) ?? unjudged(run, results));
      } catch (error) {
        show((await post(`runs/${k}/failed`, error.message)) ?? { ...unjudged(run), reason: error.message });
      }
    }
    gpu.device.destroy();
  }
  await post("finished");
}

// With `?shown`, what the last page reported.
async function showAgain() {
  const { adapter, skipped, verdicts } = await json("verdicts.json");
  byId("adapter").textContent = adapter;
  verdicts.forEach(show);
  skipped.forEach(([device, lacks]) => skip(device, lacks));
}

try {
  await (location.search === "?shown" ? showAgain() : runAll());
} catch (error) {
  byId("adapter").textContent = error.message;
  byId("adapter").className = "fail";
  await post("failed", error.message);
}

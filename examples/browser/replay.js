// Replays exported plans on WebGPU and shows what the program that serves this page says of the results. Nothing here knows the
// loss: shaders, buffers, bindings and workgroups are data.

const get = async (path) => {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: HTTP status ${response.status}`);
  return response;
};
const json = async (path) => (await get(path)).json();
// The answer; null from a server that only has the files.
const post = async (path, body) => {
  const response = await fetch(path, { method: "POST", body });
  return response.ok ? response.json() : null;
};

// What the adapter or the browser lacks for a device; empty if it has everything.
function missing(adapter, { features, limits, language }) {
  return [
    ...features.filter((name) => !adapter.features.has(name)).map((name) => `the feature ${name}`),
    ...Object.entries(limits)
      .filter(([name, value]) => !(adapter.limits[name] >= value))
      .map(([name, value]) => `${name} ${value}`),
    ...language.filter((name) => !navigator.gpu.wgslLanguageFeatures?.has(name)).map((name) => `${name} in WGSL`),
  ].join(", ");
}

// A device with exactly what it names, so that whatever else a shader needs is an error.
async function open(adapter, { name, features, limits }) {
  const device = await adapter.requestDevice({ label: name, requiredFeatures: features, requiredLimits: limits });
  const modules = new Map();
  const pipelines = new Map();
  const compile = async (path) => {
    const module = device.createShaderModule({ label: path, code: await (await get(path)).text() });
    const errors = (await module.getCompilationInfo()).messages.filter(({ type }) => type === "error");
    if (errors.length > 0) throw new Error(errors.map((e) => `${path}:${e.lineNum}: ${e.message}`).join("\n"));
    return module;
  };
  const once = (map, key, make) => map.get(key) ?? map.set(key, make()).get(key);
  const pipeline = ({ shader, entry: entryPoint }) =>
    once(pipelines, `${shader} ${entryPoint}`, async () => {
      const module = await once(modules, shader, () => compile(shader));
      return device.createComputePipelineAsync({ label: entryPoint, layout: "auto", compute: { module, entryPoint } });
    });
  return { device, pipeline };
}

// The bytes of the plan's results.
async function replay({ device, pipeline }, plan, contents) {
  const filters = ["internal", "out-of-memory", "validation"];
  filters.forEach((filter) => device.pushErrorScope(filter));
  const buffers = new Map();
  for (const { name, bytes, uniform, contents: part } of plan.buffers) {
    const usage = uniform ? GPUBufferUsage.UNIFORM : GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC;
    const buffer = device.createBuffer({ label: name, size: bytes, usage, mappedAtCreation: true });
    const mapped = new Uint8Array(buffer.getMappedRange());
    mapped.fill(0xff); // NaN, so that what is read before it is written shows
    if (part) mapped.set(new Uint8Array(contents, part.offset, part.bytes));
    buffer.unmap();
    buffers.set(name, buffer);
  }
  const pipelines = await Promise.all(plan.dispatches.map(pipeline));
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  plan.dispatches.forEach(({ entry, bindings, workgroups }, k) => {
    const entries = bindings.map(({ binding, buffer, offset, bytes: size }) => (
      { binding, resource: { buffer: buffers.get(buffer), offset, size } }
    ));
    pass.setPipeline(pipelines[k]);
    pass.setBindGroup(0, device.createBindGroup({ label: entry, layout: pipelines[k].getBindGroupLayout(0), entries }));
    pass.dispatchWorkgroups(...workgroups);
  });
  pass.end();
  const size = plan.results.reduce((sum, name) => sum + buffers.get(name).size, 0);
  const staging = device.createBuffer({ size, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
  let offset = 0;
  for (const buffer of plan.results.map((name) => buffers.get(name))) {
    encoder.copyBufferToBuffer(buffer, 0, staging, offset, buffer.size);
    offset += buffer.size;
  }
  device.queue.submit([encoder.finish()]);
  const errors = (await Promise.all(filters.map(() => device.popErrorScope()))).filter((error) => error);
  if (errors.length > 0) throw new Error(errors.map((error) => error.message).join("\n"));
  await staging.mapAsync(GPUMapMode.READ);
  const results = staging.getMappedRange().slice(0);
  [staging, ...buffers.values()].forEach((buffer) => buffer.destroy());
  return results;
}

// The table.
const byId = (id) => document.getElementById(id);
const element = (name, text = "", className = "") => Object.assign(document.createElement(name), { textContent: text, className });
const row = (...cells) => {
  const tr = element("tr");
  tr.append(...cells.map((cell) => (cell instanceof Node ? cell : element("td", cell))));
  return tr;
};
const groups = new Map();

function group({ device, dtype }) {
  const key = `${device}, ${dtype}`;
  if (!groups.has(key)) {
    const [runs, passed, failed] = ["0", "0", "0"].map((zero) => element("td", zero, "number"));
    byId("summary").append(row(device, dtype, runs, passed, failed, ""));
    const details = element("details");
    details.open = groups.size === 0;
    const table = element("table");
    const head = [["case"], ["loss", 1], ["expected loss", 1], ["largest gradient error", 1], ["tolerance", 1], [""]];
    table.append(row(...head.map(([text, number]) => element("th", text, number ? "number" : ""))));
    details.append(element("summary", `${dtype} embeddings, ${device}`), table);
    byId("details").append(details);
    groups.set(key, { runs, passed, failed, table, details });
  }
  return groups.get(key);
}

function show(verdict) {
  const { runs, passed, failed, table, details } = group(verdict);
  const judged = verdict.passed !== null;
  const count = (cell) => (cell.textContent = Number(cell.textContent) + 1);
  count(runs);
  if (judged) count(verdict.passed ? passed : failed);
  if (verdict.passed === false) details.open = true;
  passed.className = Number(passed.textContent) > 0 ? "number pass" : "number";
  failed.className = Number(failed.textContent) > 0 ? "number fail" : "number";
  const numbers = [verdict.loss, verdict.expected_loss, verdict.gradient_error, verdict.tolerance];
  const [word, look] = !judged ? ["not judged", "quiet"] : verdict.passed ? ["PASS", "pass"] : ["FAIL", "fail"];
  const name = element("td", verdict.case);
  if (verdict.reason) name.append(element("div", verdict.reason, "reason"));
  table.append(row(name, ...numbers.map((text) => element("td", text, "number")), element("td", word, look)));
}

function skip(device, reason) {
  const cell = element("td", `skipped: this browser or adapter lacks ${reason}`, "quiet");
  cell.colSpan = 5;
  byId("summary").append(row(device, cell));
}

// A server that only has the files judges nothing: then the loss, the first f32 of the results, stands beside the expected one.
const unjudged = (run, results) => ({
  ...run,
  loss: results ? new DataView(results).getFloat32(256, true).toFixed(8) : "",
  expected_loss: run.expected_loss.toFixed(8),
  gradient_error: "",
  tolerance: "",
  passed: null,
});

async function runAll() {
  if (!navigator.gpu) throw new Error("this browser has no WebGPU, or only for pages from https or localhost");
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new Error("this browser has WebGPU, but no adapter for it");
  const { vendor, architecture, device: model, description } = adapter.info;
  const browser = navigator.userAgent.match(/\b(Firefox|Edg|Chrome|HeadlessChrome|Version)\/[\d.]+/)?.[0] ?? "";
  const name = `${[vendor, architecture, model, description].filter((part) => part).join(" ") || "a nameless adapter"}, ${browser}`;
  byId("adapter").textContent = name;
  await post("started", name);
  const { devices, runs } = await json("index.json");
  for (const wanted of devices) {
    // A device uses up its adapter.
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
    const lacks = missing(adapter, wanted);
    if (lacks) {
      skip(wanted.name, lacks);
      await post("skipped", `${wanted.name}\nthis browser or adapter lacks ${lacks}`);
      continue;
    }
    const gpu = await open(adapter, wanted);
    for (const [k, run] of runs.entries()) {
      if (run.device !== wanted.name) continue;
      try {
        const [plan, contents] = await Promise.all([json(run.plan), get(run.contents).then((r) => r.arrayBuffer())]);
        const results = await replay(gpu, plan, contents);
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
  skipped.forEach(([device, reason]) => skip(device, reason.replace("this browser or adapter lacks ", "")));
}

try {
  await (location.search === "?shown" ? showAgain() : runAll());
} catch (error) {
  byId("adapter").textContent = error.message;
  byId("adapter").className = "fail";
  await post("failed", error.message);
}

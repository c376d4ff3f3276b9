// Replays exported plans on WebGPU. Nothing here knows the loss: shaders, buffers, bindings and workgroups are data.

export const get = async (path) => {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: HTTP status ${response.status}`);
  return response;
};

// What the adapter or the browser lacks for a device; empty if it has everything.
export function missing(adapter, { features, limits, language }) {
  return [
    ...features.filter((name) => !adapter.features.has(name)).map((name) => `the feature ${name}`),
    ...Object.entries(limits)
      .filter(([name, value]) => !(adapter.limits[name] >= value))
      .map(([name, value]) => `${name} ${value}`),
    ...language.filter((name) => !navigator.gpu.wgslLanguageFeatures?.has(name)).map((name) => `${name} in WGSL`),
  ].join(", ");
}

// A device with exactly what it names, so that whatever else a shader needs is an error.
export async function open(adapter, { name, features, limits }) {
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
export async function replay({ device, pipeline }, plan, contents) {
  const pipelines = await Promise.all(plan.dispatches.map(pipeline));
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

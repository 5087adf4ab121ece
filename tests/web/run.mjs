// Runs graphs of a bundle in onnxruntime-web: a line of JSON in asks for one run, a line out answers.
// In: {"file", "feeds": {name: {"type", "shape", "data"}}}; out: {name: {"type", "shape", "data"}}, or {"error"}.
// Without feeds the graph is loaded alone.
import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
const bundle = process.argv[2];
const weights = { path: "weights.safetensors", data: fs.readFileSync(path.join(bundle, "weights.safetensors")) };
const opened = new Map();

async function session(file) {
  if (!opened.has(file)) {
    const options = { executionProviders: ["wasm"], externalData: [weights] };
    opened.set(file, await ort.InferenceSession.create(fs.readFileSync(path.join(bundle, file)), options));
  }
  return opened.get(file);
}

async function answer({ file, feeds }) {
  const graph = await session(file);
  if (feeds === null) return {};
  const given = {};
  for (const name of graph.inputNames) {
    const { type, shape, data } = feeds[name];
    const values = type === "int64" ? BigInt64Array.from(data.map(BigInt)) : Float32Array.from(data);
    given[name] = new ort.Tensor(type, values, shape);
  }
  const made = await graph.run(given);
  return Object.fromEntries(
    Object.entries(made).map(([name, tensor]) => {
      return [name, { type: tensor.type, shape: tensor.dims, data: Array.from(tensor.data, Number) }];
    }),
  );
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  const made = await answer(JSON.parse(line)).catch((error) => ({ error: String(error) }));
  process.stdout.write(JSON.stringify(made) + "\n");
}

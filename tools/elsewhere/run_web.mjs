// Run every ONNX file of a folder in onnxruntime-web's WebAssembly backend: node run_web.mjs FOLDER OUT MODULES
// → OUT/*.npy and OUT/facts.json. The folder has the inputs in floats.npy and pixels.npy; MODULES is the node_modules
// folder with onnxruntime-web. Nothing of this project.

import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, out, modules] = process.argv.slice(2);
const require = createRequire(pathToFileURL(join(resolve(modules), "package.json")));
const ort = require("onnxruntime-web");
const BATCH = 64;

// NumPy's format: magic, version, the header's length, the header (a Python literal), the values.
function readArray(path, type) {
  const bytes = readFileSync(path);
  const start = 10 + bytes.readUInt16LE(8);
  const shape = bytes.toString("latin1", 10, start).match(/\(([^)]*)\)/)[1].split(",").filter((word) => word.trim()).map(Number);
  return { values: new type(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + bytes.length)), shape };
}

function writeArray(path, values, shape) {
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`.padEnd(117) + "\n";
  const start = Buffer.from("\x93NUMPY\x01\x00\x00\x00" + header, "latin1");
  start.writeUInt16LE(header.length, 8);
  writeFileSync(path, Buffer.concat([start, Buffer.from(Float32Array.from(values).buffer)]));
}

const inputs = {
  float32: readArray(join(folder, "floats.npy"), Float32Array),
  uint8: readArray(join(folder, "pixels.npy"), Uint8Array),
};
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
mkdirSync(out);
for (const name of readdirSync(folder).filter((entry) => entry.endsWith(".onnx")).sort()) {
  const session = await ort.InferenceSession.create(readFileSync(join(folder, name)), { executionProviders: ["wasm"] });
  const [given] = session.inputMetadata;
  const { values, shape } = inputs[given.type];
  const [images, ...rest] = shape;
  const size = rest.reduce((product, length) => product * length, 1);
  const outputs = [];
  for (let first = 0; first < images; first += BATCH) {
    const last = Math.min(images, first + BATCH);
    const batch = new ort.Tensor(given.type, values.slice(first * size, last * size), [last - first, ...rest]);
    outputs.push(...(await session.run({ [given.name]: batch }))[session.outputNames[0]].data);
  }
  writeArray(join(out, name.replace(/onnx$/, "npy")), outputs, [images, outputs.length / images]);
}
writeFileSync(join(out, "facts.json"), JSON.stringify({ version: ort.env.versions.web, node: process.version }));

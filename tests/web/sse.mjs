// Parses the event streams of stdin ([[piece, ...], ...], pieces in hex) and writes the data that came out of each.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { EventParser } = await import(pathToFileURL(process.argv[2]));
const made = JSON.parse(readFileSync(0, "utf8")).map((pieces) => {
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(Uint8Array.from(Buffer.from(piece, "hex"))));
});
process.stdout.write(JSON.stringify(made));

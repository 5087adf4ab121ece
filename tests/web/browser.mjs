// Drives one page of a headless Chromium: a line of JSON in calls a method, a line out answers.
// In: {"call": "open", "args": [url, options of the context]}, {"call": "heard"} for what the page complained of and
// asked for, {"call": "forget"} for its complaints, which are then forgotten, or a method of playwright's Page ("keyboard.press" too) with its arguments. Out: {"value"}, or {"error"}.
import readline from "node:readline";
import { chromium } from "playwright-core";

const browser = await chromium.launch({ executablePath: process.argv[2] });
const heard = { complaints: [], requests: [] };
let context, page;

async function open(url, options) {
  await context?.close();
  Object.assign(heard, { complaints: [], requests: [] });
  context = await browser.newContext(options);
  page = await context.newPage();
  page.setDefaultTimeout(30_000);
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) heard.complaints.push(message.text());
  });
  page.on("pageerror", (error) => heard.complaints.push(String(error)));
  page.on("request", (request) => heard.requests.push([request.url(), request.postData()]));
  await page.goto(url);
}

async function answer({ call, args = [] }) {
  if (call === "open") return open(...args);
  if (call === "heard") return heard;
  if (call === "forget") return heard.complaints.splice(0);
  const names = call.split(".");
  const owner = names.slice(0, -1).reduce((object, name) => object[name], page);
  const made = await owner[names.at(-1)](...args);
  // Handles of playwright's are of no use outside.
  return ["evaluate", "textContent", "inputValue", "isVisible", "isDisabled"].includes(call) ? made : null;
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  const made = await answer(JSON.parse(line)).then(
    (value) => ({ value: value ?? null }),
    (error) => ({ error: String(error) }),
  );
  process.stdout.write(JSON.stringify(made) + "\n");
}
await browser.close();

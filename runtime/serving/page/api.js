// The server's paths: the model it serves, and answers as they come.
import { EventParser } from "./sse.js";

/**
 * @typedef {{ id: string, family: string, target: string, max_depth: number, threshold: number, max_context: number,
 *   chat_template: string, tokenizer: boolean, defaults: Record<string, any> }} Model
 * @typedef {{ id: number, text: string, depth: number, logprob: number, others: [string, number][] }} Token
 *   `others` are the likeliest tokens there with their log-probabilities, itself among them where it is one
 * @typedef {{ text: string, tokens: Token[] }} Piece text and the tokens that made it
 * @typedef {{ completion_tokens: number, mean_depth: number, block_calls: number, time_s: number,
 *   prompt_tokens: number, prompt_tokens_details: { cached_tokens: number } }} Usage
 * @typedef {{ piece?: Piece, finish?: string, usage?: Usage }} News
 */

/** Something that went wrong, told in one line. */
export class Failure extends Error {}

const LOST = "The connection to the server was lost.";

/** @returns {Promise<Model>} */
export async function servedModel() {
  const response = await reached("/v1/models");
  return (await response.json()).data[0];
}

/**
 * The news of one answer, to its end.
 * @param {string} path
 * @param {object} body
 * @param {AbortSignal} signal ends it
 * @returns {AsyncGenerator<News>}
 */
export async function* answer(path, body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  const response = await reached(path, { method: "POST", headers, body: JSON.stringify(asked), signal });
  const parser = new EventParser();
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  let whole = false;
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Failure(LOST);
    });
    if (done) break;
    for (const data of parser.push(value)) {
      if (data === "[DONE]") whole = true;
      else yield newsOf(JSON.parse(data));
    }
  }
  if (!whole) throw new Failure(LOST);
}

/**
 * @param {string} path
 * @param {RequestInit} [options]
 */
async function reached(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().then((values) => values?.error?.message).catch(() => undefined);
  throw new Failure(told ?? `The server answered ${response.status} ${response.statusText}.`);
}

/**
 * @param {any} event
 * @returns {News}
 */
function newsOf(event) {
  if (event.error) throw new Failure(event.error.message);
  const choice = event.choices[0];
  if (!choice) return { usage: event.usage };
  const text = choice.delta?.content ?? choice.text ?? "";
  const entries = choice.logprobs ? entriesOf(choice.logprobs) : [];
  const tokens = choice.depths.map((/** @type {number} */ depth, /** @type {number} */ at) => {
    return { id: choice.token_ids[at], depth, ...entries[at] };
  });
  return { piece: { text, tokens }, finish: choice.finish_reason ?? undefined };
}

/**
 * Text and log-probability of tokens, which chat and completions tell in two ways.
 * @param {any} told
 * @returns {{ text: string, logprob: number, others: [string, number][] }[]}
 */
function entriesOf({ content, tokens, token_logprobs, top_logprobs }) {
  if (content) {
    return content.map((/** @type {any} */ one) => {
      const others = one.top_logprobs.map((/** @type {any} */ other) => [other.token, other.logprob]);
      return { text: one.token, logprob: one.logprob, others };
    });
  }
  return tokens.map((/** @type {string} */ text, /** @type {number} */ at) => {
    return { text, logprob: token_logprobs[at], others: Object.entries(top_logprobs?.[at] ?? {}) };
  });
}

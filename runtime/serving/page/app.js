// The page: asks the server for answers and puts them on the screen.
import { Answer, comparison, Reader } from "./answer.js";
import { answer, Failure, servedModel } from "./api.js";
import { at, field, fit, made, on } from "./dom.js";
import { listenToFrame } from "./frame.js";
import { drawScale } from "./heat.js";
import { deepest, depthControls, Group, remember, remembered, SAMPLING } from "./settings.js";
import { watchTokens } from "./tokens.js";

/**
 * @typedef {{ prompt: string, chat: boolean, answers: Answer[], kept: number, element: HTMLElement, line: HTMLElement }} Turn
 * @typedef {import("./api.js").Model} Model
 */

const MODES = ["chat", "completion"];
// Tokens whose probability is told beside that of the one that was taken.
const LIKELIEST = 3;
const NAMES = ["First answer", "Second answer"];

class Page {
  /** @param {Model} model */
  constructor(model) {
    this.model = model;
    /** @type {Turn[]} */
    this.turns = [];
    /** @type {AbortController | null} */
    this.working = null;
    const stored = remembered(model.id);
    this.plain = model.chat_template === "plain";
    this.mode = MODES.includes(stored.mode) ? stored.mode : MODES[Number(this.plain)];
    if (!model.tokenizer) this.mode = "completion";
    this.heat = stored.heat !== false;
    this.compare = stored.compare === true;
    this.system = typeof stored.system === "string" ? stored.system : "";
    const changed = () => this.#changed();
    const second = { max_depth: Math.max(1, Math.floor(deepest(model) / 2)) };
    this.depth = [stored.first ?? {}, stored.second ?? second].map((values, at) => {
      return new Group(NAMES[at], `answer-${at + 1}`, depthControls(model), values, changed, "Reset to the model's");
    });
    this.sampling = new Group("Sampling", "sampling", SAMPLING, stored.sampling ?? {}, changed, "Reset");
    this.compareBox = made("input", { type: "checkbox", id: "compare", checked: this.compare });
    this.systemBox = made("textarea", { id: "system", rows: 2, value: this.system });
    this.systemControl = made("div", { className: "control system" });
    this.#layOut();
    this.#listen();
    this.#show();
  }

  #layOut() {
    const { id, family, target, max_depth, threshold } = this.model;
    const facts = [family, target, `${max_depth} loop steps`, `threshold ${Number(threshold.toPrecision(6))}`];
    at("model").replaceChildren(made("b", { textContent: id }), ` ${facts.join(" · ")}`);
    document.title = `${id} · mythos-edge`;
    const compare = made("label", { className: "switch compare" });
    compare.append(this.compareBox, made("span", { textContent: "A second answer beside it" }));
    this.systemControl.append(made("label", { htmlFor: "system", textContent: "System message" }), this.systemBox);
    const [first, second] = this.depth.map(({ element }) => element);
    at("controls").replaceChildren(first, compare, second, this.sampling.element, this.systemControl);
    drawScale(at("scale"), deepest(this.model));
    at("welcome").append(made("p", { className: "note", textContent: this.#note() }));
  }

  #note() {
    if (!this.model.tokenizer) return "This model has no tokenizer: write token ids, such as 90 90 91 15.";
    if (!this.plain) return "Chat renders the model's template; Completion continues your text as it stands.";
    return "This model has no chat template: it continues text. Chat puts the messages one after the other.";
  }

  #listen() {
    on("composer", "submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    const prompt = field("prompt");
    prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    prompt.addEventListener("input", () => fit(prompt));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.working?.abort();
    });
    on("stop", "click", () => this.working?.abort());
    on("retry", "click", () => this.#again());
    on("edit", "click", () => this.#edit());
    on("clear", "click", () => this.#clear());
    on("modes", "change", () => {
      this.mode = /** @type {HTMLInputElement} */ (document.querySelector("[name=mode]:checked")).value;
      this.#changed();
    });
    on("heat", "change", () => {
      this.heat = /** @type {HTMLInputElement} */ (at("heat")).checked;
      this.#changed();
    });
    this.compareBox.addEventListener("change", () => {
      this.compare = this.compareBox.checked;
      this.#changed();
    });
    this.systemBox.addEventListener("input", () => {
      this.system = this.systemBox.value;
      this.#changed();
    });
    watchTokens(at("talk"), at("tip"), at("announcer"), (element) => {
      const all = this.turns.flatMap(({ answers }) => answers);
      return all.find((one) => one.element === element);
    });
  }

  #changed() {
    const [first, second] = this.depth.map(({ values }) => values);
    const { mode, heat, compare, system } = this;
    remember(this.model.id, { mode, heat, compare, system, first, second, sampling: this.sampling.values });
    this.#show();
  }

  #show() {
    const { mode, working, turns } = this;
    for (const input of /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll("[name=mode]"))) {
      input.checked = input.value === mode;
      input.disabled = Boolean(working) || (input.value === "chat" && !this.model.tokenizer);
    }
    /** @type {HTMLInputElement} */ (at("heat")).checked = this.heat;
    document.body.classList.toggle("heated", this.heat);
    this.depth[1].element.hidden = !this.compare;
    this.systemControl.hidden = mode !== "chat";
    at("welcome").hidden = turns.length > 0;
    at("send").hidden = Boolean(working);
    at("stop").hidden = !working;
    for (const name of ["retry", "edit", "clear"]) {
      /** @type {HTMLButtonElement} */ (at(name)).disabled = !turns.length || Boolean(working);
    }
    const asked = mode === "chat" ? "Message" : this.model.tokenizer ? "Text to continue" : "Token ids to continue";
    at("prompt-label").textContent = asked;
    field("prompt").placeholder = asked;
  }

  #send() {
    const prompt = field("prompt").value;
    if (this.working || !prompt.trim()) return;
    if (this.mode === "chat") field("prompt").value = "";
    fit(field("prompt"));
    this.#ask(prompt);
  }

  #again() {
    const last = this.#dropLast();
    if (!last) return;
    this.mode = MODES[Number(!last.chat)];
    this.#ask(last.prompt);
  }

  #edit() {
    const last = this.#dropLast();
    if (!last) return;
    this.mode = MODES[Number(!last.chat)];
    this.#put(last.prompt);
    this.#show();
  }

  /** @param {string} text */
  #put(text) {
    const prompt = field("prompt");
    prompt.value = text;
    fit(prompt);
    prompt.focus();
  }

  #clear() {
    if (this.working) return;
    while (this.#dropLast());
    this.#show();
    field("prompt").focus();
  }

  #dropLast() {
    const last = this.working ? undefined : this.turns.pop();
    last?.element.remove();
    return last;
  }

  /** @param {string} prompt */
  async #ask(prompt) {
    const { path, body } = this.#request(prompt);
    const chat = this.mode === "chat";
    const groups = this.compare ? this.depth : this.depth.slice(0, 1);
    const answers = groups.map((group, number) => {
      const title = this.compare ? NAMES[number] : "Answer";
      return new Answer({ title, words: group.words(), most: deepest(this.model), given: chat ? "" : prompt });
    });
    const turn = this.#turn(prompt, answers, chat);
    const working = (this.working = new AbortController());
    this.#show();
    turn.element.scrollIntoView({ block: "end" });
    const told = groups.map((group, number) => {
      return this.#follow(turn, answers[number], path, { ...body, ...group.fields() }, working.signal);
    });
    await Promise.allSettled(told);
    this.working = null;
    this.#show();
  }

  /**
   * Where to ask, and what; the depth comes with each answer.
   * @param {string} prompt
   */
  #request(prompt) {
    const drawn = Math.floor(Math.random() * 2 ** 31);
    // Both answers draw alike, so that nothing but their depth makes them differ.
    const seed = this.sampling.value("seed") === "" ? drawn : this.sampling.value("seed");
    const temperature = this.sampling.value("temperature");
    const body = { model: this.model.id, temperature, seed, max_tokens: this.sampling.value("max_tokens") };
    if (this.mode === "chat") {
      const messages = this.system.trim() ? [{ role: "system", content: this.system }] : [];
      for (const turn of this.turns.filter(({ chat }) => chat)) {
        const content = turn.answers[turn.kept].text;
        if (content) messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content });
      }
      messages.push({ role: "user", content: prompt });
      return { path: "/v1/chat/completions", body: { ...body, messages, logprobs: true, top_logprobs: LIKELIEST } };
    }
    const given = this.model.tokenizer ? prompt : prompt.split(/[\s,]+/).filter(Boolean).map(Number);
    return { path: "/v1/completions", body: { ...body, prompt: given, logprobs: LIKELIEST } };
  }

  /**
   * @param {string} prompt
   * @param {Answer[]} answers
   * @param {boolean} chat
   * @returns {Turn}
   */
  #turn(prompt, answers, chat) {
    const element = made("div", { className: "turn" });
    if (chat) element.append(made("p", { className: "prompt", textContent: prompt }));
    const beside = made("div", { className: answers.length > 1 ? "answers two" : "answers" });
    beside.append(...answers.map((one) => one.element));
    const line = made("p", { className: "comparison", hidden: answers.length < 2 });
    element.append(beside, line);
    const turn = { prompt, chat, answers, kept: 0, element, line };
    answers.forEach((one, number) => {
      one.copy.addEventListener("click", () => copy(one));
      one.keep.addEventListener("click", () => (chat ? this.#keep(turn, number) : this.#put(prompt + one.text)));
      one.keep.textContent = "Continue";
      one.keep.title = "Put the text with this answer into the field, to go on from there";
      one.keep.hidden = chat;
    });
    at("talk").append(element);
    this.turns.push(turn);
    if (chat && answers.length > 1) this.#keep(turn, 0);
    return turn;
  }

  /**
   * The talk goes on with one of two answers.
   * @param {Turn} turn
   * @param {number} kept
   */
  #keep(turn, kept) {
    turn.kept = kept;
    turn.answers.forEach(({ element, keep }, number) => {
      element.classList.toggle("kept", number === kept);
      keep.hidden = false;
      keep.setAttribute("aria-pressed", String(number === kept));
      keep.textContent = number === kept ? "Kept" : "Keep";
      keep.title = "The talk goes on with the answer that is kept";
    });
  }

  /**
   * Puts an answer on the screen as it comes.
   * @param {Turn} turn
   * @param {Answer} one
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} signal
   */
  async #follow(turn, one, path, body, signal) {
    const read = turn.answers[0] === one ? new Reader() : null;
    try {
      for await (const news of answer(path, body, signal)) {
        const low = atBottom();
        if (news.piece && !this.model.tokenizer) spell(news.piece);
        one.hear(news);
        read?.hear(news.piece?.text ?? "");
        this.#compare(turn);
        if (low) turn.element.scrollIntoView({ block: "end" });
      }
      one.close();
    } catch (error) {
      if (signal.aborted) one.close("stopped");
      else if (error instanceof Failure) one.close("failed", error.message);
      else {
        one.close("failed", "The page cannot read the answer.");
        console.error(error);
      }
    } finally {
      read?.end();
      this.#compare(turn);
    }
  }

  /** @param {Turn} turn */
  #compare({ answers: [first, second], line }) {
    if (second) line.textContent = comparison(first, second);
  }
}

/**
 * Tokens without text are shown as their ids.
 * @param {import("./api.js").Piece} piece
 */
function spell(piece) {
  for (const token of piece.tokens) token.text = `${token.id} `;
  piece.text = piece.tokens.map(({ text }) => text).join("");
}

/** @param {Answer} one */
async function copy(one) {
  try {
    await navigator.clipboard.writeText(one.text);
    one.copy.textContent = "Copied";
  } catch {
    // only pages of this machine, or with TLS, may write to the clipboard
    getSelection()?.selectAllChildren(one.body);
    one.copy.textContent = "Selected: copy with Ctrl C";
  }
  setTimeout(() => (one.copy.textContent = "Copy"), 2000);
}

function atBottom() {
  const { scrollHeight, scrollTop, clientHeight } = at("talk");
  return scrollHeight - scrollTop - clientHeight < 80;
}

listenToFrame();
try {
  new Page(await servedModel());
  document.body.classList.add("ready");
} catch (error) {
  if (!(error instanceof Failure)) throw error;
  at("notice").textContent = `${error.message} Start mythos-edge serve, then load this page again.`;
  at("notice").hidden = false;
}

// Server-sent events. Source: the HTML standard, "9.2.6 Interpreting an event stream"; of fields only data.

/** Takes a stream's bytes in pieces, cut anywhere, and gives out the data of every event that is complete. */
export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {Uint8Array} bytes
   * @returns {string[]} the data of the events that these bytes complete
   */
  push(bytes) {
    this.#rest += this.#decoder.decode(bytes, { stream: true });
    const events = [];
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      // A carriage return at the end may be half of a line's end.
      if (end < 0 || (this.#rest[end] === "\r" && end + 1 === this.#rest.length)) return events;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (this.#rest.startsWith("\r\n", end) ? 2 : 1));
      if (line !== "") {
        const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line) ?? [];
        if (field === "data") this.#data.push(value);
      } else if (this.#data.length) {
        events.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
  }
}

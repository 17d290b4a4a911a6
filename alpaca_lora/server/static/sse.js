// Server-sent events (HTML standard, 9.2.6). Pure: pieces of text in, the data of whole events out.

const MAX_LENGTH = 1 << 20; // characters of one event; a stream without an end must not fill the memory

export class EventParser {
  #rest = "";
  #data = [];
  #size = 0;
  #afterReturn = false; // a CR ended the last line: a LF right behind it belongs to it

  // The data of each event that is complete with this piece.
  push(piece) {
    let text = this.#afterReturn && piece.startsWith("\n") ? piece.slice(1) : piece;
    if (piece !== "") this.#afterReturn = piece.endsWith("\r");
    text = this.#rest + text;
    const lines = text.split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length > 0) events.push(this.#data.join("\n"));
        this.#data = [];
        this.#size = 0;
        continue;
      }
      const colon = line.indexOf(":");
      const field = colon === -1 ? line : line.slice(0, colon);
      if (field !== "data") continue; // comments keep the connection open; ids and names are not used here
      const value = colon === -1 ? "" : line.slice(colon + 1);
      this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
      this.#size += value.length;
    }
    if (this.#rest.length + this.#size > MAX_LENGTH) throw new RangeError("an event is too long");
    return events;
  }
}

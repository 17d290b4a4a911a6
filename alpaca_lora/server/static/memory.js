// One of the browser's storages of texts, or the page's memory where the browser gives none (policies, private windows).

export class Memory {
  #fallback = new Map();

  // storage() -> localStorage or sessionStorage; asking for it may already be refused
  constructor(storage) {
    this.storage = usable(storage);
  }

  // Whether what is kept outlives the page.
  get lasts() {
    return this.storage !== null;
  }

  get(name) {
    return this.lasts ? this.storage.getItem(name) : (this.#fallback.get(name) ?? null);
  }

  // Throws what the browser throws when it is full.
  set(name, text) {
    if (this.lasts) this.storage.setItem(name, text);
    else this.#fallback.set(name, text);
  }

  // A preference: where the browser is full it holds until the page is left.
  prefer(name, text) {
    try {
      this.set(name, text);
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
    }
  }

  remove(name) {
    if (this.lasts) this.storage.removeItem(name);
    else this.#fallback.delete(name);
  }

  names() {
    return this.lasts ? Object.keys(this.storage) : [...this.#fallback.keys()];
  }
}

function usable(storage) {
  try {
    return storage();
  } catch {
    return null; // `lasts` says so, and the page tells
  }
}

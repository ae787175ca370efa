"""Decode sampled ids to a stream of text."""

import codecs
import re

# A word is a sequence of characters without white space. In Chinese and Japanese, written without
# spaces, each character is a word, with adjacent punctuation, as in word processors.
UNSPACED = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\w\s]*[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")


class TextStream:
    """Converts the ids of one sample, one at a time, to text that can be printed at once.

    Only complete characters are returned (one may be several tokens), and nothing of the stop text
    (a str, or a list of them): a possible beginning of it is held back until later tokens decide.
    With `max_words` only complete words are returned (see `WORD`), and the last one ends the text.
    """

    def __init__(self, tokenizer, stop_text="", stop_ids=(), max_words=0):
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = [stop_text] if isinstance(stop_text, str) else stop_text
        self.stop_texts = [text for text in texts if text]
        self.stop_ids = frozenset(stop_ids)
        self.words_left = max_words or None  # None: no limit
        self.pending = ""  # may be the beginning of a stop text
        self.partial_word = ""  # white space and the beginning of a word
        self.stopped = False  # by a stop id, a stop text or the last word

    def feed(self, token_id):
        """The text that `token_id` completes, often ""."""
        if self.stopped:
            return ""
        if token_id in self.stop_ids:
            return self._end(complete=True)
        return self._release(self.decoder.decode(self.token_bytes(token_id)))

    def finish(self):
        """The text still held back. An incomplete character becomes U+FFFD; with `max_words` an
        incomplete word is dropped."""
        return "" if self.stopped else self._end(complete=False)

    def _end(self, complete):
        """The rest of the text. `complete`: its last word is complete."""
        text = self._before_stop(self.decoder.decode(b"", final=True)) + self.pending
        complete = complete or self.stopped
        self.pending, self.stopped = "", True
        return self._complete_words(text, complete)

    def _release(self, text):
        text = self._before_stop(text)
        return self._complete_words(text, self.stopped)

    def _before_stop(self, text):
        text, self.pending = self.pending + text, ""
        if not self.stop_texts:
            return text
        if found := [at for stop in self.stop_texts if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self.stop_texts)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop_texts):
                self.pending = text[-length:]
                return text[:-length]
        return text

    def _complete_words(self, text, last_is_complete):
        if self.words_left is None:
            return text
        text, end = self.partial_word + text, 0
        for match in WORD.finditer(text):
            if match.end() == len(text) and not last_is_complete:
                break
            end = match.end()
            self.words_left -= 1
            if self.words_left == 0:
                self.stopped = True
                break
        self.partial_word = text[end:]
        return text[:end]

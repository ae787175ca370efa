"""Sampled ids as a stream of text."""

import codecs
import re

# A word is a run without white space. Chinese and Japanese write no spaces: there a character is
# one, with the signs around it, as word processors count them.
UNSPACED = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


WORD = re.compile(rf"[^\w\s]*[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")


class TextStream:
    """One sample's ids, one at a time, as text that can be shown at once.

    Never gives half a character (one may be several tokens), nor anything of a stop text (one, or
    a list of them): what may be its beginning is held back until the next tokens tell. With
    `max_words` never half a word either: one is given when what follows it has begun, and the last
    one ends the text (see `WORD`).
    """

    def __init__(self, tokenizer, stop_text="", stop_ids=(), max_words=0):
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = [stop_text] if isinstance(stop_text, str) else stop_text
        self.stop_texts = [text for text in texts if text]
        self.stop_ids = frozenset(stop_ids)
        self.words_left = max_words or None  # None is no limit
        self.held = ""  # may be the beginning of the stop text
        self.word = ""  # white space and a word that may go on
        self.stopped = False  # a stop id, the stop text or the last word has come; nothing follows

    def feed(self, token_id):
        """The text that `token_id` completes, often none."""
        if self.stopped:
            return ""
        if token_id in self.stop_ids:
            return self._end(whole=True)
        return self._release(self.decoder.decode(self.token_bytes(token_id)))

    def finish(self):
        """What is still held back; an incomplete character becomes U+FFFD, and with `max_words`
        a word that was not seen to end is left out."""
        return "" if self.stopped else self._end(whole=False)

    def _end(self, whole):
        """The rest of the text; `whole` where it ends here by itself, and its last word too."""
        text = self._before_stop(self.decoder.decode(b"", final=True)) + self.held
        ends = whole or self.stopped
        self.held, self.stopped = "", True
        return self._whole_words(text, ends)

    def _release(self, text):
        text = self._before_stop(text)
        return self._whole_words(text, self.stopped)

    def _before_stop(self, text):
        text, self.held = self.held + text, ""
        if not self.stop_texts:
            return text
        if found := [at for stop in self.stop_texts if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self.stop_texts)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop_texts):
                self.held = text[-length:]
                return text[:-length]
        return text

    def _whole_words(self, text, ends):
        if self.words_left is None:
            return text
        text, end = self.word + text, 0
        for match in WORD.finditer(text):
            if match.end() == len(text) and not ends:
                break
            end = match.end()
            self.words_left -= 1
            if self.words_left == 0:
                self.stopped = True
                break
        self.word = text[end:]
        return text[:end]

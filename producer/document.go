package producer

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
)

// document refuses an input that begins as a document of JSON and not with a line of JSONL: as an array of objects, or with
// an object over several lines. That is read as far as the end of the first object, which proves it, and no further than a
// line may be long.
func (s *scan) document() error {
	text := bufio.NewReader(io.NewSectionReader(s.d.src.file, 0, s.d.in.MaxPayload))
	begin, err := firstOf(text)
	if err != nil {
		return nil // it shows again when the lines are read
	}
	array := begin == '['
	if !array {
		_ = text.UnreadByte() // it was read just now
	}
	var first json.RawMessage
	if json.NewDecoder(text).Decode(&first) != nil || !bytes.HasPrefix(first, []byte("{")) {
		return nil
	}
	what, filter := "", ""
	switch {
	case array:
		what, filter = "it is a JSON array", "'.[]'"
	case bytes.IndexByte(first, '\n') >= 0:
		what, filter = "its first JSON object goes over several lines", "."
	default:
		return nil
	}
	return badFile("%s is not JSONL: %s; give a file with one JSON object a line, which `jq -c %s FILE > FILE.jsonl` makes of it", s.d.src.name, what, filter)
}

// firstOf reads up to the first byte that is neither white space nor of a byte order mark.
func firstOf(r io.ByteReader) (byte, error) {
	for {
		b, err := r.ReadByte()
		if err != nil || bytes.IndexByte([]byte(" \t\r\n\xef\xbb\xbf"), b) < 0 {
			return b, err
		}
	}
}

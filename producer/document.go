package producer

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
)

// document refuses an input that is a document of JSON and not lines of JSONL: an array of objects, or objects that go over
// several lines. That is read as far as the end of the first object, or of the second where one line may only be broken in
// two, and no further than two lines may be long.
func (s *scan) document() error {
	text := bufio.NewReader(io.NewSectionReader(s.d.src.file, 0, 2*s.d.in.MaxPayload))
	begin, err := firstOf(text)
	if err != nil {
		return nil // it shows again when the lines are read
	}
	array := begin == '['
	if !array {
		_ = text.UnreadByte() // it was read just now
	}
	objects := json.NewDecoder(text)
	var first, second json.RawMessage
	if objects.Decode(&first) != nil || !bytes.HasPrefix(first, []byte("{")) {
		return nil
	}
	what, filter := "", ""
	switch {
	case array:
		what, filter = "it is a JSON array", "'.[]'"
	case !broken(first):
		return nil
	default:
		if err := objects.Decode(&second); err == nil && !broken(second) || err != nil && !errors.Is(err, io.EOF) {
			return nil
		}
		what, filter = "its JSON objects go over several lines", "."
	}
	return badFile("%s is not JSONL: %s; give a file with one JSON object a line, which `%s` makes of it", s.d.src.name, what, s.d.src.through("jq -c "+filter))
}

// broken says whether a value goes over several lines.
func broken(value []byte) bool { return bytes.IndexByte(value, '\n') >= 0 }

// through is the command that passes the input through another one.
func (src *source) through(command string) string {
	unpack := map[string]string{"gzip": "gzip -dc", "zstd": "zstd -dc"}[src.packed]
	switch {
	case src.piped && unpack != "":
		return unpack + " | " + command
	case src.piped:
		return command
	case unpack != "":
		return unpack + " FILE | " + command + " > FILE.jsonl"
	}
	return command + " FILE > FILE.jsonl"
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

package proto

import "fmt"

// Count says how many of a thing there are: 1 line, 20 lines.
func Count[N int | int64](n N, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// Example describes the line that a kind of failure is told by.
func (e *ErrorCount) Example() string {
	line := ""
	switch {
	case e.CustomID != "":
		line = "custom_id " + e.CustomID
	case e.Line > 0:
		line = fmt.Sprintf("line %d", e.Line)
	}
	if line == "" || e.Message == "" {
		return line + e.Message
	}
	return line + ": " + e.Message
}

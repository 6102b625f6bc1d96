package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
)

// table is a report in Markdown: add figures to it, then write it.
type table struct{ rows []row }

// row is one figure, measured one or more times.
type row struct {
	what   string
	values []float64
	goal   string
	note   string
}

func (t *table) add(what string, values []float64, goal, note string) {
	t.rows = append(t.rows, row{what, values, goal, note})
}

// write prints the median, the least and the greatest of each figure.
func (t *table) write(w io.Writer) error {
	_, err := fmt.Fprintf(w, "| figure | median | min | max | n | aim | how |\n|---|---|---|---|---|---|---|\n")
	for _, r := range t.rows {
		if err != nil {
			return err
		}
		if len(r.values) == 0 {
			_, err = fmt.Fprintf(w, "| %s | – | – | – | 0 | %s | %s |\n", r.what, r.goal, r.note)
			continue
		}
		_, err = fmt.Fprintf(w, "| %s | %s | %s | %s | %d | %s | %s |\n", r.what,
			show(median(r.values)), show(slices.Min(r.values)), show(slices.Max(r.values)), len(r.values), r.goal, r.note)
	}
	return err
}

// median is the middle one, or the mean of the two in the middle.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// show rounds to three figures, and groups digits by thousands.
func show(v float64) string {
	if math.Abs(v) < 100 {
		return strconv.FormatFloat(v, 'g', 3, 64)
	}
	scale := math.Pow(10, math.Floor(math.Log10(math.Abs(v)))-2)
	s := strconv.FormatFloat(math.Round(v/scale)*scale, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

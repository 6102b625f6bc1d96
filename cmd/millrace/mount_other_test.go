//go:build !linux

package main

import "errors"

func mountSmall(dir, size string) error { return errors.ErrUnsupported }

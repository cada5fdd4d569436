//go:build !linux

package main

// Linux alone has what lab_wire_linux_test.go uses.

import (
	"errors"
	"io"
)

// runLabDelay is for Linux alone, as is the whole lab.
func runLabDelay(string, io.Writer) error { return errors.ErrUnsupported }

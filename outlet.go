package main

// How the relay writes to stdout and stderr, so that a slow reader makes nobody wait
// and a reader that goes away ends nothing.

import (
	"io"
	"sync/atomic"
	"time"
)

const (
	// outletLines and outletBytes limit how much an outlet keeps for a reader that
	// does not read: a burst of debug lines.
	outletLines = 1024
	outletBytes = 256 << 10

	// outletTimeout limits how long the process waits for a reader before it ends.
	outletTimeout = time.Second
)

// outlet writes what it is given, in order, each part by itself, in its own
// goroutine. When its reader does not read, the outlet keeps some parts and drops
// the rest. When the reader has gone, it drops everything. Make it with newOutlet,
// end it with finish.
type outlet struct {
	tell  func(w io.Writer, lost int64)
	parts chan outletPart
	bytes atomic.Int64 // in parts
	lost  atomic.Int64 // parts dropped since the last one written

	end   chan struct{} // closed by finish
	ended chan struct{} // closed when the goroutine has ended
}

// outletPart carries text to write, or a request from flush.
type outletPart struct {
	text    []byte
	reached chan<- struct{} // closed when everything before it has been written; nil: no request
}

// newOutlet returns an outlet to w, whose Write may block. Once w is read again after
// parts were dropped, tell is called with w and their number, unless it is nil.
func newOutlet(w io.Writer, tell func(w io.Writer, lost int64)) *outlet {
	o := &outlet{tell: tell, parts: make(chan outletPart, outletLines), end: make(chan struct{}), ended: make(chan struct{})}
	go o.run(w) // ends with finish, or with the process if w blocks
	return o
}

func (o *outlet) run(w io.Writer) {
	defer close(o.ended)
	for {
		select {
		case part := <-o.parts:
			o.write(w, part)
			continue
		default:
		}
		select { // nothing is waiting
		case part := <-o.parts:
			o.write(w, part)
		case <-o.end:
			return
		}
	}
}

// write writes one part. It ignores errors: they mean that the reader has gone, but
// another may come, as happens with a named pipe.
func (o *outlet) write(w io.Writer, part outletPart) {
	if part.reached != nil {
		close(part.reached)
		return
	}
	w.Write(part.text)
	o.bytes.Add(int64(-len(part.text)))
	if lost := o.lost.Swap(0); lost > 0 && o.tell != nil {
		o.tell(w, lost)
	}
}

// Write takes a copy of text. It never waits or fails.
func (o *outlet) Write(text []byte) (int, error) {
	if o.bytes.Add(int64(len(text))) <= outletBytes {
		select {
		case o.parts <- outletPart{text: append([]byte(nil), text...)}:
			return len(text), nil
		default:
		}
	}
	o.bytes.Add(int64(-len(text)))
	o.lost.Add(1)
	return len(text), nil
}

// flush waits until everything so far has been written, for outletTimeout at most.
func (o *outlet) flush() {
	reached, tooLate := make(chan struct{}), time.After(outletTimeout)
	select {
	case o.parts <- outletPart{reached: reached}:
	case <-tooLate:
		return
	}
	select {
	case <-reached:
	case <-tooLate:
	}
}

// finish ends o when everything has been written, or after outletTimeout. Later
// writes are dropped.
func (o *outlet) finish() {
	close(o.end)
	select {
	case <-o.ended:
	case <-time.After(outletTimeout):
	}
}

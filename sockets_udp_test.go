package main

// What quic-go is told of a datagram that the system refuses to send.

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
)

// A client would notice, whose connection ended because a firewall was loaded anew.
func TestRefusedDatagramsAreLost(t *testing.T) {
	refuse := func(err error) error { // as package net wraps it
		return &net.OpError{Op: "write", Net: "udp", Err: os.NewSyscallError("sendmsg", err)}
	}
	for _, lost := range []error{
		syscall.EPERM, syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ENETDOWN, syscall.ENOBUFS, syscall.EAGAIN,
		syscall.EINVAL, syscall.EADDRNOTAVAIL, syscall.EIO,
	} {
		if err := unlessLost(refuse(lost), false); err != nil {
			t.Errorf("%v ends a connection", lost)
		}
	}
	for _, told := range []error{net.ErrClosed, syscall.EMSGSIZE, syscall.Errno(10040)} {
		if err := unlessLost(refuse(told), true); !errors.Is(err, told) {
			t.Errorf("quic-go is told %v, want %v", err, told)
		}
	}
	if err := unlessLost(nil, false); err != nil {
		t.Error(err)
	}
}

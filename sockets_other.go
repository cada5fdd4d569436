//go:build !linux

package main

// Reading one datagram at a time: only Linux has what sockets_linux.go uses.

import (
	"net"

	"github.com/quic-go/quic-go"
)

// coalescing returns conn as it is.
func coalescing(conn *net.UDPConn) quic.OOBCapablePacketConn { return conn }

//go:build !linux

package main

// Linux alone has what sockets_linux.go does.

import "net"

func newUDPSocket(conn *net.UDPConn) udpSocket { return newPlainSocket(conn) }
